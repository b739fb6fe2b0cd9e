"""What is read from a file is checked before use: every key left out, of another type, out of range."""

from __future__ import annotations

import copy
import json
import math
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import FULL, METHODS, differences, exit_code, killed, tiny, train
from pydantic import BaseModel
from record_helpers import refused

import main
from config import UserError, load_config
from engine import Run
from record.checkpoint import check_state, load_checkpoint, save_checkpoint
from record.manifest import add_session, read_manifest
from record.metrics import read_metrics
from record.recordings import read_recording
from record.schema import Arrays, Checkpoint, Figures, Form, Manifest, describe

pytestmark = pytest.mark.usefixtures("in_this_process")


class Missing:
    """Stands for no entry at all."""

    def __repr__(self) -> str:
        return "missing"


MISSING = Missing()
OTHERS = [MISSING, "three", True, None, [], {}, [1], {"a": 1}, -1, 10**12, math.nan, math.inf, 0.5]


def tensors(value: torch.Tensor) -> list[Any]:
    """A tensor of another shape, dtype or memory, and with NaN, in its place."""
    other = [
        value.flatten().repeat(2),
        value.to(torch.complex64),
        torch.zeros((), dtype=value.dtype).expand(value.shape),
    ]
    other += [value.long() if value.is_floating_point() else value.float(), value.to_sparse(), value.to("meta")]
    if value.is_floating_point():
        other.append(torch.full_like(value, math.nan))
    return [t for t in other if t.dtype != value.dtype or t.shape != value.shape or value.dim()]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where the entries of a nested value are; of many alike the first."""
    if isinstance(value, Mapping):
        entries = list(value.items())
        alike = path in (("model",), ("ema",), ("stabilizer",), ("optimizer", "state"))
        for key, inner in entries[:1] if alike else entries:
            yield (*path, key)
            yield from places(inner, (*path, key))
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(
            value[:1] if value and isinstance(value[0], Mapping | torch.Tensor) else value[:2]
        ):
            yield (*path, index)
            yield from places(inner, (*path, index))


def changed(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """A copy of a nested value with another one at `path`."""
    if not path:
        return new
    first, *rest = path
    inner = changed(value[first], tuple(rest), new)
    if isinstance(value, Mapping):
        return {key: inner if key == first else v for key, v in value.items() if key != first or inner is not MISSING}
    items = [inner if index == first else v for index, v in enumerate(value) if index != first or inner is not MISSING]
    return type(value)(items)


def at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def fields(form: type[BaseModel], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every field of a form and of the forms in it."""
    for name, field in form.model_fields.items():
        yield (*path, field.alias or name)
        for inner in [field.annotation, *getattr(field.annotation, "__args__", ())]:
            if isinstance(inner, type) and issubclass(inner, Form):
                yield from fields(inner, (*path, name))


# Checkpoints ----------------------------------------------------------------------------------------------------------

SMALL = ["--data.num_images", "64", "--model.kwargs", "{embed_dim: 32, depth: 1, num_heads: 2}", "--probes"]
RUNS = {"freeze": [*FULL, *METHODS["freeze"], "--quant.carrier", "fp8"], "qramping": [*FULL, *METHODS["qramping"]]}
# What a run may lack or have otherwise without a word: it begins anew, belongs to the recipe or the schedule, is a
# figure that can have any value, or the state of a parameter, which one that never had a gradient has not.
FREE = {("probe",), ("ema",), *(("probe", name) for name in ("window", "tracks", "chosen", "figures"))}
FREE |= {("optimizer", "state", 0)}
FREE_KEYS = {
    "lr",
    "initial_lr",
    "lr_scale",
    "figures",
    "r_w",
    "r_Y",
    "r_Y_block",
    "given",
    "r_WQ",
    "meter",
    "best_top1",
    "blocks_below_window",
}


@pytest.fixture(scope="module", params=RUNS)
def stopped(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, dict[str, Any], Path]:
    """A run of each kind in its last epoch, amid a recording: the run, its checkpoint, its folder."""
    folder = tmp_path_factory.mktemp(request.param)
    flags = [*SMALL, *RUNS[request.param], "--save-every", "1"]
    with pytest.MonkeyPatch.context() as patch:
        killed(patch, folder / "run", 7, *flags)
    cfg = load_config(folder / "run/resolved.yaml")
    run = main.build_run(cfg, folder / "run", rank=0, world_size=1, device=torch.device("cpu"))
    return run, load_checkpoint(folder / "run/last.pt"), folder


def restored(run: Run, state: dict[str, Any]) -> dict[str, Any]:
    """What the run is after it has taken a state."""
    run.load_state_dict(state, Path("changed.pt"))
    return run.state_dict()


def test_the_checkpoint_has_every_field_of_the_schema(stopped: tuple[Run, dict[str, Any], Path]) -> None:
    _, state, _ = stopped
    state = {"blocks_below_window": 0, **state}
    held = {tuple(key for key in path if isinstance(key, str)) for path in places(state)}
    inner = {("probe", *path) for path in fields(Checkpoint.model_fields["probe"].annotation.__args__[0])}
    for path in {*fields(Checkpoint), *inner}:
        names = tuple(name for name in path if name not in ("total", "steps"))
        assert any(other[: len(names)] == names for other in held), path


def test_every_key_of_a_checkpoint_fits_or_is_refused(stopped: tuple[Run, dict[str, Any], Path]) -> None:
    run, state, _ = stopped
    reference = copy.deepcopy(restored(run, state))
    assert differences(reference, {key: state[key] for key in reference}) == []
    tried, believed = 0, []
    for number, place in enumerate(places(state)):
        old = at(state, place)
        others = ["three", None, 0.5, *tensors(old)] if isinstance(old, torch.Tensor) else OTHERS[1:]
        for new in [MISSING, *others[number % 3 :: 3]]:  # neighbours in the state take turns
            if type(new) is type(old) and not isinstance(new, torch.Tensor) and new == old:
                continue
            tried += 1
            try:
                now = restored(run, changed(state, place, new))
            except UserError as error:
                assert str(error).endswith(".") and "\n" not in str(error) and len(str(error)) < 400
                continue
            if place not in FREE and not FREE_KEYS & {*place} and (found := differences(reference, now)):
                believed.append((place, describe(new), found[0]))
    assert believed == [], "\n".join(map(str, believed))
    assert tried > 150


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"epoch": 3}, "epoch is 3, and its run has 2 epochs"),
        ({"epoch": 2}, "step is 3 after the last of its run's 2 epochs"),
        ({"step": 5}, "step is 5, and its epochs have 4 steps"),
        ({"best_top1": 1e9}, "best_top1 is 1000000000.0: input should be less than or equal to 100"),
        ({"best_top1": -1.0}, "best_top1 is -1.0 after 1 epochs"),
        ({"meter": {}}, "meter.loss is missing"),
        ({"meter": {"loss": [1.0, 9.0]}}, "meter counts more than the 3 steps"),
        ({"config": "a: &a [1]\nb: [*a, *a]"}, "a configuration has no aliases"),
        ({"config": "x" * 70_000}, "a configuration has at most 65536 characters"),
        ({"config": "[" * 5000}, "it is not valid YAML"),
        ({"config": "[1]"}, "a mapping of sections was expected"),
    ],
)
def test_a_mistake_in_a_checkpoint_is_one_sentence_and_exit_code_2(
    change: dict[str, Any],
    said: str,
    stopped: tuple[Run, dict[str, Any], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, state, _ = stopped
    save_checkpoint(tmp_path / "last.pt", {**state, **change})
    message = refused(lambda: check_state(load_checkpoint(tmp_path / "last.pt"), tmp_path / "last.pt"))
    assert said in message
    if change == {"epoch": 3}:
        assert exit_code(tiny(tmp_path / "run", "--resume", str(tmp_path / "last.pt"))) == 2
        assert capsys.readouterr().err == f"error: {message}\n"
        assert not (tmp_path / "run").exists()


# Metrics --------------------------------------------------------------------------------------------------------------

GOOD = {"type": "LOG", "step": [0], "data": {"train.loss": 1.0, "eval.top1": 50.0, "eval.loss": 1.0}}


def written(folder: Path, *lines: Any) -> Path:
    text = "".join(line if isinstance(line, str) else f"DLLL {json.dumps(line)}\n" for line in lines)
    (folder / "metrics.log").write_text(text)
    return folder


@pytest.mark.parametrize("key", GOOD)
@pytest.mark.parametrize("new", OTHERS, ids=repr)
def test_every_key_of_a_line_of_metrics(tmp_path: Path, key: str, new: Any) -> None:
    line = changed(GOOD, (key,), new)
    if (key, new) in (("step", []), ("step", [1]), ("data", {}), ("data", {"a": 1})):
        assert read_metrics(written(tmp_path, GOOD, line))
        return
    message = refused(lambda: read_metrics(written(tmp_path, GOOD, line)))
    assert message.startswith(f"Line 2 of {tmp_path / 'metrics.log'} is no line of metrics: ") and key in message


@pytest.mark.parametrize("name", [field.alias for field in Figures.model_fields.values()])
@pytest.mark.parametrize("new", ["high", None, [], {}, True, -1.0, -(10**12), 1e300], ids=repr)
def test_every_figure_that_is_computed_with(tmp_path: Path, name: str, new: Any) -> None:
    line = {**GOOD, "data": {**GOOD["data"], name: new}}
    if name.endswith("loss") and isinstance(new, float | int) and not isinstance(new, bool):
        assert read_metrics(written(tmp_path, line))[0]["data"][name] == new
    elif name in ("train.seconds", "eval.seconds", "eval.r_WQ", "eval.r_Y") and new == 1e300:
        assert read_metrics(written(tmp_path, line))
    else:
        assert f"data.{name} is" in refused(lambda: read_metrics(written(tmp_path, line)))


@pytest.mark.parametrize("step", [["one"], [-1], [1.5], [True], [1, 2, 3], [10**12], [[1]], "later"])
def test_every_step_of_a_line_of_metrics(tmp_path: Path, step: Any) -> None:
    assert "step" in refused(lambda: read_metrics(written(tmp_path, {**GOOD, "step": step})))


def test_lines_that_are_no_metrics_are_passed_over(tmp_path: Path) -> None:
    deep = "DLLL " + "[" * 100_000 + "\n"
    number = "DLLL " + "9" * 10_000 + "\n"
    units = {"type": "METADATA", "metric": "train.loss", "metadata": {"unit": "nat"}}
    assert len(read_metrics(written(tmp_path, "\n", "no json\n", deep, number, units, GOOD))) == 1
    assert "no line of metrics: 5" in refused(lambda: read_metrics(written(tmp_path, "5\n"))).replace("input", "5")


# Manifest -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("finished") / "run", *SMALL, "--quant.scheme", "mx")


def test_every_key_of_a_manifest(finished: Path, tmp_path: Path) -> None:
    good = read_manifest(finished)
    assert {path[0] for path in fields(Manifest)} == good.keys()
    for place in places(good):
        for new in [value for value in OTHERS if not isinstance(value, float) or math.isfinite(value)]:
            (tmp_path / "manifest.json").write_text(json.dumps(changed(good, place, new)))
            try:
                read = read_manifest(tmp_path)
            except UserError as error:
                assert str(error).startswith(f"{tmp_path / 'manifest.json'} is no manifest of a run: ")
                continue
            add_session(read, good, None)  # what is accepted can be used
    for key, new in (("classes", "ten"), ("classes", 0), ("steps_per_epoch", -1), ("sessions", [1]), ("sessions", {})):
        (tmp_path / "manifest.json").write_text(json.dumps({**good, key: new}))
        message = refused(lambda: read_manifest(tmp_path))
        assert message.startswith(f"{tmp_path / 'manifest.json'} is no manifest of a run: {key}")


# Recordings -----------------------------------------------------------------------------------------------------------


def other_arrays(array: np.ndarray) -> Iterator[np.ndarray]:
    """An array of another type, dimension, size or range in its place."""
    yield np.array("text") if array.dtype.kind != "U" or array.ndim else np.array(["text"])
    yield array[..., None]
    yield array.astype(complex) if array.dtype.kind != "U" else np.zeros(array.shape)
    if array.ndim:
        yield array[:0]
        yield array[0]
        yield np.concatenate([array, array])
    if array.dtype.kind == "f":
        yield np.full_like(array, np.nan)
    if array.dtype.kind in "iu":
        yield np.full_like(array, -1)
        yield array.astype(float)


def test_every_array_of_a_recording(finished: Path, tmp_path: Path) -> None:
    path = finished / "probes/epoch_0002.npz"
    good = read_recording(path)
    assert good.keys() == Arrays.model_fields.keys()
    broken = tmp_path / "epoch_0002.npz"
    for name, array in good.items():
        np.savez(broken, **{key: value for key, value in good.items() if key != name})
        if name == "r_Y_block":  # which recordings of before have not
            assert name not in read_recording(broken)
        else:
            assert f"{name} is missing" in refused(lambda: read_recording(broken))
        for number, other in enumerate(other_arrays(array)):
            np.savez(broken, **{**good, name: other})
            assert "is no recording of a probe" in refused(lambda: read_recording(broken)), (name, number)
    only = {name: good[name] for name in ("layers", "block", "epoch", "first_step", "steps", "r_w", "r_Y")}
    np.savez(broken, **only)
    assert read_recording(broken).keys() == only.keys()  # of a run in full precision


def test_an_array_that_is_not_as_large_as_it_says(tmp_path: Path) -> None:
    path = tmp_path / "epoch_0001.npz"
    for shape in ("(1000000000000,)", "(2, 3)", "(-1,)"):
        header = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("r_w.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode())
        assert "cannot be read" in refused(lambda: read_recording(path))


def test_an_archive_that_unpacks_to_too_much(tmp_path: Path) -> None:
    path = tmp_path / "epoch_0001.npz"
    np.savez_compressed(path, r_w=np.zeros(2**25 + 1))
    assert path.stat().st_size < 2**20
    assert "it unpacks to" in refused(lambda: read_recording(path))
