"""Compilers that a run calls itself: one that is missing or does not work is a sentence, before anything is loaded."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from helpers import exit_code, replace, tiny

from config import UserError, load_config
from training.build import pick_device
from training.compilers import check_compilers, failure_of_compilers

pytestmark = pytest.mark.usefixtures("in_this_process")

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
MX = load_config(overrides=["quant.scheme=mx"])
COMPILED = load_config(overrides=["run.compile=true"])
C, CPP = "Triton needs a C compiler for its kernels on a GPU, and ", "torch.compile needs a C++ compiler on a CPU, and "


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of programs of a machine that has none, on which Triton has compiled nothing yet."""
    programs = tmp_path / "programs"
    programs.mkdir()
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    for name in ("CC", "CXX", "TORCH_INDUCTOR_INSTALL_GXX"):
        monkeypatch.delenv(name, raising=False)
    return programs


def program(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def sentence(cfg=MX, device=CUDA) -> str:
    with pytest.raises(UserError) as error:
        check_compilers(cfg, device)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


NO_HEADERS = "echo 'check.c:1:10: fatal error: Python.h: No such file or directory' >&2; exit 1"


def test_no_c_compiler_at_all() -> None:
    assert sentence() == C + "there is no gcc or clang on PATH: install gcc, or set CC to a C compiler."


@pytest.mark.parametrize("value", ["", "gcc", "/nowhere/gcc", "ccache gcc", "/"])
def test_cc_that_names_no_program(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", value)
    assert sentence().startswith(C + f"CC is {value!r}, which is no program: set CC to a C compiler")


@pytest.mark.parametrize("name", ["gcc", "clang"])
def test_headers_of_python_that_are_missing(name: str, machine: Path, capfd: pytest.CaptureFixture[str]) -> None:
    compiler = program(machine / name, NO_HEADERS)
    assert sentence().startswith(C + f"{compiler} finds no Python.h: install the headers of Python (python3-dev")
    assert capfd.readouterr().err == ""  # the compiler's own lines are not beside the sentence


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("exit 1", "it ends with exit code 1"),
        ("exit 0", "No such file or directory"),  # it wrote nothing
        ("echo 'cc1: error: bad value for -march' >&2; exit 1", "(bad value for -march)"),
        ("while [ $# -gt 1 ]; do [ $1 = -o ] && echo text > $2; shift; done", "compiler_check"),  # no module
    ],
)
def test_a_compiler_that_does_not_compile(
    script: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", program(tmp_path / "mine", script))
    said = sentence()
    assert said.startswith(C + f"{tmp_path / 'mine'} cannot compile them (") and reason in said


@pytest.mark.parametrize("scheme", ["mx", "none"])
def test_the_program_says_it_before_it_looks_for_data(
    scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    replace(monkeypatch, pick_device, lambda cfg: CUDA)
    flags = ["--data-set", "imagenet", "--data-path", str(tmp_path / "nowhere"), "--no-cuda-graphs"]
    assert exit_code(tiny(tmp_path / "run", *flags, "--quant.scheme", scheme)) == 2
    err = capsys.readouterr().err
    assert (
        err.startswith(f"error: {C}there is no gcc" if scheme == "mx" else "error: data.path") and err.count("\n") == 1
    )
    assert not (tmp_path / "run").exists()


def test_what_needs_no_compiler_is_not_refused(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for scheme in ("none", "int4"):
        check_compilers(load_config(overrides=[f"quant.scheme={scheme}"]), CUDA)
    check_compilers(load_config(overrides=["quant.scheme=mx", "quant.active=[]"]), CUDA)
    check_compilers(MX, CPU)
    with pytest.raises(UserError, match="Triton needs a C compiler"):
        check_compilers(COMPILED, CUDA)


@pytest.mark.skipif(not (shutil.which("gcc") or shutil.which("clang")), reason="needs a C compiler")
def test_a_compiler_that_works_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    empty = os.environ["PATH"]
    monkeypatch.undo()
    found = shutil.which("gcc") or shutil.which("clang")
    cache = Path(empty).with_name("cache")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(cache))
    monkeypatch.setenv("CC", found)
    check_compilers(MX, CUDA)
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", empty)
    check_compilers(MX, CUDA)  # what Triton has in its cache needs no compiler
    shutil.rmtree(cache)
    assert "there is no gcc or clang on PATH" in sentence()


@pytest.mark.skipif(not shutil.which("gcc"), reason="needs a C compiler")
def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.undo()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert sentence().startswith("Triton cannot keep the kernels that it compiles (Not a directory: ")


def test_no_cpp_compiler_for_torch_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor.config as inductor  # takes a second

    with inductor.patch({"cpp.cxx": (None, "g++")}):
        assert sentence(COMPILED, CPU) == CPP + (
            "there is no g++ on PATH: install g++, set CXX to a C++ compiler, or leave --compile out."
        )
    for value in ("/nowhere", "/"):
        monkeypatch.setenv("CXX", value)
        with inductor.patch({"cpp.cxx": (None, value)}):
            assert sentence(COMPILED, CPU).startswith(CPP + f"CXX is {value!r}, which does not work: ")


LATE = {  # a launcher that Triton has not compiled yet; what torch.compile meets
    "no compiler": (RuntimeError("Failed to find C compiler. Please specify via CC"), C + "there is no gcc or clang"),
    "no C++ compiler": (
        RuntimeError("InvalidCxxCompiler: No working C++ compiler found in x"),
        CPP + "there is no g++",
    ),
    "no headers": (
        RuntimeError("CppCompileError: C++ compile error\n\nOutput:\nx.h:3:4: fatal error: Python.h: No such file"),
        CPP + "it finds no Python.h",
    ),
    "no model": (
        RuntimeError("C++ compile error\n\nOutput:\nx.h:3:4: error: no omp.h\n"),
        CPP + "it cannot compile the",
    ),
    "another": (RuntimeError("CUDA error: an illegal memory access"), None),
    "a file": (FileNotFoundError(2, "No such file", "data.txt"), None),
}


@pytest.mark.parametrize(("error", "said"), LATE.values(), ids=LATE.keys())
def test_a_compiler_that_is_missed_in_the_middle_of_a_run(error: Exception, said: str | None) -> None:
    found = failure_of_compilers(error)
    assert found is None if said is None else (found.startswith(said) and len(found.splitlines()) == 1)


def test_cc_that_is_gone_in_the_middle_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "/nowhere/gcc")
    with pytest.raises(FileNotFoundError) as error:
        subprocess.check_call(["/nowhere/gcc"])
    assert failure_of_compilers(error.value).startswith(C + "CC is '/nowhere/gcc', which is no program")
