#!/usr/bin/env bash
# Table 6: without quantizers in the forward pass (DeiT-B).
#   DATA_PATH=/path/to/imagenet bash scripts/table6.sh [ROW [MODEL] | all] [flags of main.py]      # see scripts/table.sh
exec bash "$(dirname -- "${BASH_SOURCE[0]}")/table.sh" 6 "$@"
