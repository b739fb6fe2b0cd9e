#!/usr/bin/env bash
# TetraJet, DeiT-T on Tiny ImageNet (64x64): no row of the paper, so nothing is published to compare with.
#   DATA_PATH=/path/to/tiny-imagenet bash scripts/tiny_imagenet_tetrajet.sh [flags of main.py]      # see scripts/run.sh
root="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
exec bash "$root/scripts/run.sh" "$root/configs/tiny_imagenet_tetrajet.yaml" "$@"
