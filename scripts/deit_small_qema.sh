#!/usr/bin/env bash
# Table 2, DeiT-Small, TetraJet + Q-EMA: published top-1 72.25 % (ImageNet-1K, 90 epochs).
#   DATA_PATH=/path/to/imagenet bash scripts/deit_small_qema.sh [flags of main.py]      # more settings: scripts/run.sh
root="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
exec bash "$root/scripts/run.sh" "$root/configs/deit_small_qema.yaml" "$@"
