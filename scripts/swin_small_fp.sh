#!/usr/bin/env bash
# Table 2, Swin-Small, full precision: published top-1 80.44 % (ImageNet-1K, 90 epochs).
#   DATA_PATH=/path/to/imagenet bash scripts/swin_small_fp.sh [flags of main.py]      # more settings: scripts/run.sh
root="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
exec bash "$root/scripts/run.sh" "$root/configs/swin_small_fp.yaml" "$@"
