#!/usr/bin/env bash
# DeiT-Base, Quartet (2505.14669) (ImageNet-1K, 90 epochs).
#   DATA_PATH=/path/to/imagenet bash scripts/methods/deit_base_quartet.sh [flags of main.py]      # more settings: scripts/run.sh
root="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd)"
exec bash "$root/scripts/run.sh" "$root/configs/methods/deit_base_quartet.yaml" "$@"
