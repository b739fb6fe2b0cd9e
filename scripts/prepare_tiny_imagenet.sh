#!/usr/bin/env bash
# From one's own download of Tiny ImageNet to the folders train/CLASS/ and val/CLASS/ that --data-path takes.
#
#   bash scripts/prepare_tiny_imagenet.sh tiny-imagenet-200.zip /data/tiny-imagenet                     # all 200 classes
#   bash scripts/prepare_tiny_imagenet.sh tiny-imagenet-200 /data/tiny-imagenet-100 --classes FILE      # those of FILE
#   bash scripts/prepare_tiny_imagenet.sh tiny-imagenet-200.zip /data/tiny-imagenet-100 \
#     --classes configs/studies/tiny_imagenet_100.txt --first 400                                       # that of the studies
#
# The download is a zip or the folder it was unpacked to. FILE has a class a line: n01443537, or a TSV with such a column.
# --first N takes that many training images of a class, those of the lowest numbers, and none whose bytes are there twice.
# What is incomplete is refused. Started again, it writes what is missing. It needs a Python and no package.
set -euo pipefail
exec "${PYTHON:-python3}" "$(dirname -- "${BASH_SOURCE[0]}")/prepare_tiny_imagenet.py" "$@"
