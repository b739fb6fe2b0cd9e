"""The models: DeiT-T/S/B and Swin-T/S from timm, their block linears quantized.

Importing this package registers an `mxfp4_` twin of each in timm's registry (`timm.list_models("mxfp4_*")`).
"""

from models.zoo import ZOO, ZooModel, create_model, quantizer_table
from timm_patches import apply_patches

apply_patches()

__all__ = ["ZOO", "ZooModel", "create_model", "quantizer_table"]
