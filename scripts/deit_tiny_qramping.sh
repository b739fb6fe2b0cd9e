#!/usr/bin/env bash
# Table 2, DeiT-Tiny, TetraJet + Q-Ramping: published top-1 60.31 % (ImageNet-1K, 90 epochs).
#   DATA_PATH=/path/to/imagenet bash scripts/deit_tiny_qramping.sh [flags of main.py]      # more settings: scripts/run.sh
root="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
exec bash "$root/scripts/run.sh" "$root/configs/deit_tiny_qramping.yaml" "$@"
