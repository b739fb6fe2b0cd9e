#!/usr/bin/env bash
# Swin-Tiny, MXFP4 backward (2502.20586) (ImageNet-1K, 90 epochs).
#   DATA_PATH=/path/to/imagenet bash scripts/methods/swin_tiny_mxfp4_tseng.sh [flags of main.py]      # more settings: scripts/run.sh
root="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd)"
exec bash "$root/scripts/run.sh" "$root/configs/methods/swin_tiny_mxfp4_tseng.yaml" "$@"
