#!/usr/bin/env bash
# Table 5: backward rounding, backward operands and scale rule (DeiT-T).
#   DATA_PATH=/path/to/imagenet bash scripts/table5.sh [ROW [MODEL] | all] [flags of main.py]      # see scripts/table.sh
exec bash "$(dirname -- "${BASH_SOURCE[0]}")/table.sh" 5 "$@"
