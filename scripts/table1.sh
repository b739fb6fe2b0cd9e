#!/usr/bin/env bash
# Table 1: one quantizer active at a time (DeiT-T, DeiT-S).
#   DATA_PATH=/path/to/imagenet bash scripts/table1.sh [ROW [MODEL] | all] [flags of main.py]      # see scripts/table.sh
exec bash "$(dirname -- "${BASH_SOURCE[0]}")/table.sh" 1 "$@"
