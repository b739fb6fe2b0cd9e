#!/usr/bin/env bash
# Table 2: the methods (DeiT-T, DeiT-S, DeiT-B, Swin-T, Swin-S).
#   DATA_PATH=/path/to/imagenet bash scripts/table2.sh [ROW [MODEL] | all] [flags of main.py]      # see scripts/table.sh
exec bash "$(dirname -- "${BASH_SOURCE[0]}")/table.sh" 2 "$@"
