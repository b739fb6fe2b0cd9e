#!/usr/bin/env bash
# Table 2, DeiT-Base, INT4 per tensor: published top-1 68.13 % (ImageNet-1K, 90 epochs).
#   DATA_PATH=/path/to/imagenet bash scripts/deit_base_int4.sh [flags of main.py]      # more settings: scripts/run.sh
root="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
exec bash "$root/scripts/run.sh" "$root/configs/deit_base_int4.yaml" "$@"
