#!/usr/bin/env bash
# Table 9: decay of Q-EMA (DeiT-B).
#   DATA_PATH=/path/to/imagenet bash scripts/table9.sh [ROW [MODEL] | all] [flags of main.py]      # see scripts/table.sh
exec bash "$(dirname -- "${BASH_SOURCE[0]}")/table.sh" 9 "$@"
