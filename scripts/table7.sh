#!/usr/bin/env bash
# Table 7: element formats (DeiT-T).
#   DATA_PATH=/path/to/imagenet bash scripts/table7.sh [ROW [MODEL] | all] [flags of main.py]      # see scripts/table.sh
exec bash "$(dirname -- "${BASH_SOURCE[0]}")/table.sh" 7 "$@"
