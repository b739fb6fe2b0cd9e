"""The compilers that a run calls itself: of C, for Triton on a GPU; of C++, for torch.compile on a CPU."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator

import torch

from config import Config, UserError

# As small as an extension module of Python can be; Triton's launchers of kernels are such modules.
_NAME = "compiler_check"
_MODULE = f"""#include <Python.h>
static struct PyModuleDef module = {{PyModuleDef_HEAD_INIT, "{_NAME}", NULL, -1, NULL}};
PyMODINIT_FUNC PyInit_{_NAME}(void) {{ return PyModule_Create(&module); }}
"""
_FOUND_NONE = ("Failed to find C compiler", "No working C++ compiler found")  # Triton; torch.compile
_NO_PLACE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EEXIST)
_COMPLAINT = re.compile(r"error: (.*)")  # of gcc and clang, behind the place


def check_compilers(cfg: Config, device: torch.device) -> None:
    """Raises UserError where the run will need a compiler and there is none that works. Kernels that were compiled on
    an earlier day lie in Triton's cache and need none."""
    if device.type == "cuda":
        if cfg.run.compile or (cfg.quant.scheme == "mx" and cfg.quant.active):
            _check_triton()
    elif cfg.run.compile:
        _check_torch_compile()


def _check_triton() -> None:
    try:
        from triton.runtime.build import compile_module_from_src
    except ImportError:  # there is no Triton for macOS, for example; the reference serves
        return
    with _stderr_kept() as said:
        try:
            compile_module_from_src(src=_MODULE, name=_NAME)
            return
        except (OSError, RuntimeError, ImportError, subprocess.CalledProcessError) as error:
            problem = error
    raise UserError(_c_sentence(problem, said[0])) from None


def _check_torch_compile() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler  # takes a second, and --compile alone needs it

    try:
        get_cpp_compiler()
    except (RuntimeError, OSError) as error:
        raise UserError(_cpp_sentence(str(error))) from None


def failure_of_compilers(error: Exception) -> str | None:
    """A sentence for an error that a compiler has caused in the middle of a run; None for other errors."""
    text = str(error)
    if isinstance(error, RuntimeError) and (_FOUND_NONE[1] in text or "C++ compile error" in text):
        return _cpp_sentence(text)
    is_compiler = isinstance(error, FileNotFoundError) and error.filename == os.environ.get("CC")
    if is_compiler or (isinstance(error, RuntimeError) and _FOUND_NONE[0] in text):
        return _c_sentence(error, "")
    return None


def _c_sentence(error: Exception, said: str) -> str:
    given = os.environ.get("CC")
    found = given if given is not None else shutil.which("gcc") or shutil.which("clang")
    need = "Triton needs a C compiler for its kernels on a GPU"
    if found is None:
        return f"{need}, and there is no gcc or clang on PATH: install gcc, or set CC to a C compiler."
    if shutil.which(found) is None:
        return f"{need}, and CC is {found!r}, which is no program: set CC to a C compiler, or install gcc and unset CC."
    if "Python.h" in said:
        return (
            f"{need}, and {found} finds no Python.h: install the headers of Python (python3-dev, python3-devel), or "
            "use a Python that has them."
        )
    if isinstance(error, OSError) and error.errno in _NO_PLACE:
        return (
            f"Triton cannot keep the kernels that it compiles ({error.strerror}: {error.filename}): set "
            "TRITON_CACHE_DIR to a folder that can be written, with room on its disk."
        )
    reason = f"it ends with exit code {error.returncode}" if hasattr(error, "returncode") else _short(error)
    if complaint := _COMPLAINT.search(said):
        reason = complaint[1]
    return f"{need}, and {found} cannot compile them ({reason}): set CC to another C compiler, or install gcc."


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _cpp_sentence(said: str) -> str:
    need, without = "torch.compile needs a C++ compiler on a CPU", "or leave --compile out"
    if "Python.h" in said:
        return (
            f"{need}, and it finds no Python.h: install the headers of Python (python3-dev, python3-devel), {without}."
        )
    if complaint := _COMPLAINT.search(said.partition("C++ compile error")[2]):
        return f"{need}, and it cannot compile the model ({complaint[1]}): set CXX to another one, {without}."
    given = os.environ.get("CXX")
    lacking = "there is no g++ on PATH" if given is None else f"CXX is {given!r}, which does not work"
    return f"{need}, and {lacking}: install g++, set CXX to a C++ compiler, {without}."


@contextlib.contextmanager
def _stderr_kept() -> Iterator[list[str]]:
    """Keep what this process and those that it starts write to stderr meanwhile: at the end the list's only entry."""
    said: list[str] = []
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield said
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            said.append(file.read().decode(errors="replace"))
