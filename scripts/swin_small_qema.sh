#!/usr/bin/env bash
# Table 2, Swin-Small, TetraJet + Q-EMA: published top-1 79.74 % (ImageNet-1K, 90 epochs).
#   DATA_PATH=/path/to/imagenet bash scripts/swin_small_qema.sh [flags of main.py]      # more settings: scripts/run.sh
root="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
exec bash "$root/scripts/run.sh" "$root/configs/swin_small_qema.yaml" "$@"
