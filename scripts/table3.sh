#!/usr/bin/env bash
# Table 3: rates of change at the end of training (DeiT-T); the runs are Table 4's.
#   DATA_PATH=/path/to/imagenet bash scripts/table3.sh [ROW [MODEL] | all] [flags of main.py]      # see scripts/table.sh
exec bash "$(dirname -- "${BASH_SOURCE[0]}")/table.sh" 3 "$@"
