"""The plan of the code: which room may import which, no circles, no long lists of parameters. Read off the files."""

from __future__ import annotations

import ast
import functools
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
from quick import some

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("config", "images", "record", "training", "results", "studies", "models", "timm_patches", "quantization")
FACES = ("main", "engine", "datasets", "report", "study")  # all Python files at the root

# What a room may import of ours, beside itself. A room not named here may import anything that makes no circle.
ALLOWED = {
    "config": (),
    "quantization": (),
    "images": ("config",),
    "record": ("config", "quantization.watch.recording"),
    "timm_patches": ("quantization",),
    "models": ("config", "quantization", "record", "timm_patches"),  # record: the file of a packed model
    "results": ("config", "record", "quantization", "studies.grid", "studies.questions"),
    "studies": ("config", "record"),
    "training": ("config", "datasets", "images", "models", "quantization", "record"),
    "datasets": ("config", "images"),
}
# The floors of quantization, from below: a module imports those of its own floor and below.
FLOORS = (
    ("words", "formats", "noise", "constants", "rotation", "policy"),
    ("spec",),
    ("job", "recipes"),
    ("backends",),
    ("quantize", "oscillation"),
    ("operands",),
    ("layers",),
    ("stabilizers", "export"),
    ("watch",),
)
# Imports within functions, and why.
LATE = {
    ("quantization.backends.choose", "quantization.backends.gpu"): "Triton is optional",
    ("quantization.stabilizers.qramping", "quantization.backends.gpu"): "Triton is optional",
    ("images.gpu", "images.kernels"): "Triton is optional",
    ("studies.plan", "record.metrics"): "imports torch, and most of what scripts ask needs none",
    ("study", "studies.conduct"): "the same",
}
PARAMETERS = 8


@functools.cache
def modules() -> dict[str, Path]:
    """Our modules by their dotted names."""
    found = {path.stem: path for path in ROOT.glob("*.py")}
    for path in itertools.chain.from_iterable((ROOT / room).rglob("*.py") for room in ROOMS):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_in(source: str, known: set[str]) -> Iterator[tuple[str, bool]]:
    """(module of ours, whether it is imported within a function) for every import of a source text.

    `from a import b` is the module a.b where there is one, else a.
    """

    def names(node: ast.AST) -> list[str]:
        if isinstance(node, ast.Import):
            return [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            return [
                f"{node.module}.{a.name}" if f"{node.module}.{a.name}" in known else node.module for a in node.names
            ]
        return []

    def walk(node: ast.AST, late: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            for name in names(child):
                if name.split(".")[0] in {k.split(".")[0] for k in known}:
                    yield name, late
            yield from walk(child, late or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))

    return walk(ast.parse(source), False)


def edges(sources: dict[str, str]) -> set[tuple[str, str, bool]]:
    """(module, module of ours that it imports, whether within a function)."""
    known = set(sources)
    return {(name, target, late) for name, text in sources.items() for target, late in imports_in(text, known)}


def within(name: str, room: str) -> bool:
    return name == room or name.startswith(f"{room}.")


def floor_of(name: str) -> int:
    """Which floor of quantization a module is on; its face is above all."""
    part = name.split(".")[1] if "." in name else ""
    return next((number for number, floor in enumerate(FLOORS) if part in floor), len(FLOORS))


def circle_in(found: set[tuple[str, str, bool]]) -> list[str]:
    """The modules of a circle of imports; empty if there is none. A package and its modules are different things."""
    reached = {name: {target for source, target, _ in found if source == name} for name, *_ in found}
    state: dict[str, int] = {}

    def visit(name: str, path: list[str]) -> list[str]:
        state[name] = 1
        for target in sorted(reached.get(name, ())):
            if state.get(target) == 1:
                return [*path[path.index(target) :], target] if target in path else [name, target]
            if target not in state and (circle := visit(target, [*path, target])):
                return circle
        state[name] = 2
        return []

    for name in sorted(reached):
        if name not in state and (circle := visit(name, [name])):
            return circle
    return []


def faults(sources: dict[str, str]) -> list[str]:
    """What breaks the rules, in words."""
    found, broken = edges(sources), []
    for name, target, late in sorted(found):
        room = name.split(".")[0]
        allowed = ALLOWED.get(room)
        if allowed is not None and not any(within(target, to) for to in (room, *allowed)):
            broken.append(f"{name} imports {target}, which {room} may not")
        if room not in FACES and target.split(".")[0] in ("main", "engine", "report", "study"):
            broken.append(f"{name} imports {target}, a program's face")
        if room == "quantization" and within(target, "quantization") and floor_of(name) < floor_of(target):
            broken.append(f"{name} imports {target} upwards")
        if late and not any(within(name, a) and within(target, b) for a, b in LATE):
            broken.append(f"{name} imports {target} within a function")
    if circle := circle_in(found):
        broken.append(f"a circle: {' > '.join(circle)}")
    return broken


@functools.cache
def sources() -> dict[str, str]:
    return {name: path.read_text() for name, path in modules().items()}


def test_the_rooms_import_each_other_as_planned_and_in_no_circle() -> None:
    assert faults(sources()) == []


PLANTED = {  # the controls: (module, import) that the rules forbid, and what is said of it
    "config reads torch's side": ("config.fold", "from quantization.spec import ROUNDINGS", "which config may not"),
    "quantization reads configuration": ("quantization.spec", "import config", "which quantization may not"),
    "record reads training": ("record.runlog", "from training.run import Run", "which record may not"),
    "results read training": ("results.tables", "import training.step", "which results may not"),
    "training reads the engine": ("training.step", "import engine", "a program's face"),
    "patches read models": ("timm_patches", "from models import ZOO", "which timm_patches may not"),
    "a circle of two": ("quantization.noise", "from quantization.layers import clock", "upwards"),
    "a circle within a room": ("training.state", "from training.run import Run", "a circle"),
    "upwards": ("quantization.backends.reference", "from quantization.operands import prepare", "upwards"),
    "late": ("training.step", "def f():\n    from record import metrics", "within a function"),
}


@pytest.mark.parametrize("plant", some(PLANTED, every=2))
def test_a_planted_import_is_found(plant: str) -> None:
    name, text, said = PLANTED[plant]
    changed = {**sources(), name: f"{sources()[name]}\n{text}\n"}
    assert any(said in fault for fault in faults(changed))


def test_the_root_holds_the_faces_alone() -> None:
    assert {path.stem for path in ROOT.glob("*.py")} == set(FACES)


def long_lists(source: str) -> list[str]:
    """Functions with too many parameters; kernels, which Triton calls, may have them."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list):
            continue
        names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        if len([name for name in names if name not in ("self", "cls", "ctx")]) > PARAMETERS:
            found.append(node.name)
    return found


def test_no_function_takes_more_than_eight_parameters() -> None:
    more = {path: path.read_text() for room in ("benchmarks", "tests") for path in (ROOT / room).glob("*.py")}
    everything = {**{str(modules()[name]): text for name, text in sources().items()}, **more}
    assert {name: found for name, text in everything.items() if (found := long_lists(text))} == {}
    assert long_lists("def f(a, b, c, d, *, e, f, g, h, i): ...") == ["f"]  # the control


def test_files_are_read_in_one_sitting() -> None:
    long = {name: text.count("\n") for name, text in sources().items() if text.count("\n") > 450}
    assert long == {}
