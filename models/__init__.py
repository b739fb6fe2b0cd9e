"""The models: DeiT-T/S/B and Swin-T/S from timm, their block linears quantized.

Importing this package applies the patches of timm and registers an `mxfp4_` twin of each model in timm's registry
(`timm.list_models("mxfp4_*")`). `load_packed` makes the model of a file that `main.py --export` has written.
"""

from models.packed import load_packed, save_packed
from models.register import REGISTRATION
from models.zoo import ZOO, ZooModel, create_model, quantizer_table
from timm_patches import PATCHES as TIMM_PATCHES
from timm_patches import apply_patches

PATCHES = (REGISTRATION, *TIMM_PATCHES)  # what a run's manifest lists
apply_patches(PATCHES)

__all__ = ["PATCHES", "ZOO", "ZooModel", "create_model", "load_packed", "quantizer_table", "save_packed"]
