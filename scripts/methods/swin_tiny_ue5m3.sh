#!/usr/bin/env bash
# Swin-Tiny, UE5M3 scales (2609.02846) (ImageNet-1K, 90 epochs).
#   DATA_PATH=/path/to/imagenet bash scripts/methods/swin_tiny_ue5m3.sh [flags of main.py]      # more settings: scripts/run.sh
root="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd)"
exec bash "$root/scripts/run.sh" "$root/configs/methods/swin_tiny_ue5m3.yaml" "$@"
