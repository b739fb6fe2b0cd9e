"""Which backend computes what: the Triton kernels where they can serve, else the reference. Both give the same bits."""

from __future__ import annotations

import functools
import warnings
from types import ModuleType

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from quantization.backends import int4, reference
from quantization.job import Job, Packed
from quantization.spec import QuantizerSpec

BACKENDS = ("auto", "reference", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
IN_LAYERS = "auto"  # the backend of what layers do
SLOW = "some quantizers of this recipe have no kernel: the reference computes them on the GPU, to the same bits, slowly"


@functools.cache
def _kernels() -> ModuleType:
    """The backend of Triton kernels; imported where a tensor is there that it could serve."""
    from quantization.backends.gpu import launch

    return launch


def backend_of_tensor(x: Tensor, spec: QuantizerSpec, backend: str) -> ModuleType:
    """The backend that quantizes a tensor. Raises ValueError where `backend` is `triton` and it cannot serve."""
    if backend == "reference" or (backend == "auto" and (not x.is_cuda or isinstance(x, FakeTensor))):
        return reference
    try:
        launch = _kernels()
    except ImportError as error:  # there is no Triton for macOS, for example
        if backend == "auto":
            return reference
        raise ValueError("backend='triton' needs the package triton, which cannot be imported here") from error
    if launch.serves(spec) and (x.dim() == 2 or spec.axis in (-1, x.dim() - 1)):
        if x.is_cuda or launch.INTERPRETED:
            return launch
        raise ValueError("backend='triton' takes CUDA tensors; CPU tensors only under TRITON_INTERPRET=1")
    if backend == "auto":
        return reference
    raise ValueError(
        f"the Triton kernels have no {spec} in blocks of {spec.block_size} along axis {spec.axis} of a tensor of rank "
        f"{x.dim()}; "
        "use backend='auto' or 'reference'"
    )


@functools.lru_cache(maxsize=1024)
def _on_gpu(job: Job | QuantizerSpec) -> bool:
    """Whether the kernels serve a matrix on a GPU."""
    try:
        serves = _kernels().serves_job(job) if isinstance(job, Job) else _kernels().serves(job)
    except ImportError:
        return False
    if not serves:
        warnings.warn(SLOW, stacklevel=2)  # shown once, for it is always the same
    return serves


def _without_kernels(x: Tensor) -> bool:
    """Whether there is nothing in a tensor for a kernel to do, or no GPU to do it on."""
    off_gpu = IN_LAYERS == "reference" or (IN_LAYERS == "auto" and not x.is_cuda)
    return off_gpu or x.numel() == 0 or isinstance(x, FakeTensor)


def _backend(x: Tensor, job: Job | QuantizerSpec) -> ModuleType:
    return reference if _without_kernels(x) or not _on_gpu(job) else _kernels()


def backend_of_job(x: Tensor, job: Job) -> ModuleType:
    """The backend that prepares a matrix."""
    return _backend(x, job)


def backend_of_packed(packed: Packed) -> ModuleType:
    """The backend that expands a packed matrix: the kernels where its scales are powers of two of blocks in a row."""
    plain = packed.spec.power_of_two and packed.spec.block_rows == 1
    return _backend(packed.codes, packed.spec) if plain else reference


def backend_of_turning(x: Tensor) -> ModuleType:
    """The backend that turns a matrix back: the kernel of every size of a rotation."""
    if _without_kernels(x) or x.dtype not in DTYPES:
        return reference
    try:
        return _kernels()
    except ImportError:
        return reference


def backend_of_int4(x: Tensor) -> ModuleType:
    """The backend of what INT4 does number by number, for a float32 tensor or what a product has made."""
    if _without_kernels(x) or x.dtype not in DTYPES:
        return int4
    try:
        from quantization.backends.gpu import int4 as kernels
    except ImportError:
        return int4
    return kernels
