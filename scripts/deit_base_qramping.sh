#!/usr/bin/env bash
# Table 2, DeiT-Base, TetraJet + Q-Ramping: published top-1 75.62 % (ImageNet-1K, 90 epochs).
#   DATA_PATH=/path/to/imagenet bash scripts/deit_base_qramping.sh [flags of main.py]      # more settings: scripts/run.sh
root="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
exec bash "$root/scripts/run.sh" "$root/configs/deit_base_qramping.yaml" "$@"
