#!/usr/bin/env bash
# Table 2, DeiT-Tiny, INT4 per tensor: published top-1 40.14 % (ImageNet-1K, 90 epochs).
#   DATA_PATH=/path/to/imagenet bash scripts/deit_tiny_int4.sh [flags of main.py]      # more settings: scripts/run.sh
root="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
exec bash "$root/scripts/run.sh" "$root/configs/deit_tiny_int4.yaml" "$@"
