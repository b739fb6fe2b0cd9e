#!/usr/bin/env bash
# Table 4: methods against weight oscillation (DeiT-T, DeiT-S).
#   DATA_PATH=/path/to/imagenet bash scripts/table4.sh [ROW [MODEL] | all] [flags of main.py]      # see scripts/table.sh
exec bash "$(dirname -- "${BASH_SOURCE[0]}")/table.sh" 4 "$@"
