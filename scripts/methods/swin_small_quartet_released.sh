#!/usr/bin/env bash
# Swin-Small, Quartet as released (2505.14669) (ImageNet-1K, 90 epochs).
#   DATA_PATH=/path/to/imagenet bash scripts/methods/swin_small_quartet_released.sh [flags of main.py]      # more settings: scripts/run.sh
root="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd)"
exec bash "$root/scripts/run.sh" "$root/configs/methods/swin_small_quartet_released.yaml" "$@"
