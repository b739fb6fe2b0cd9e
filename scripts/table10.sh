#!/usr/bin/env bash
# Table 10: k1 and k2 of Q-Ramping (DeiT-B).
#   DATA_PATH=/path/to/imagenet bash scripts/table10.sh [ROW [MODEL] | all] [flags of main.py]      # see scripts/table.sh
exec bash "$(dirname -- "${BASH_SOURCE[0]}")/table.sh" 10 "$@"
