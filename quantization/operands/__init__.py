"""What the products of a linear layer read: each of X, W and G quantized for the two products it enters."""

from quantization.operands.forms import G, LinearJobs, W, X, forms_of
from quantization.operands.prepare import prepare, turned_back, values_of
from quantization.operands.products import COLUMNS, ROWS, multiply

__all__ = [
    "COLUMNS",
    "ROWS",
    "G",
    "LinearJobs",
    "W",
    "X",
    "forms_of",
    "multiply",
    "prepare",
    "turned_back",
    "values_of",
]
