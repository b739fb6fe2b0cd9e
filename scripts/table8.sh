#!/usr/bin/env bash
# Table 8: default and tuned hyper-parameters of Q-EMA and Q-Ramping (all five models).
#   DATA_PATH=/path/to/imagenet bash scripts/table8.sh [ROW [MODEL] | all] [flags of main.py]      # see scripts/table.sh
exec bash "$(dirname -- "${BASH_SOURCE[0]}")/table.sh" 8 "$@"
