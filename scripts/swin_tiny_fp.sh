#!/usr/bin/env bash
# Table 2, Swin-Tiny, full precision: published top-1 78.35 % (ImageNet-1K, 90 epochs).
#   DATA_PATH=/path/to/imagenet bash scripts/swin_tiny_fp.sh [flags of main.py]      # more settings: scripts/run.sh
root="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
exec bash "$root/scripts/run.sh" "$root/configs/swin_tiny_fp.yaml" "$@"
