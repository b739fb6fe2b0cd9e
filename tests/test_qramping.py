"""Q-Ramping: periods and its AdamW, by hand and in runs on a tiny model."""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import differences, exit_code, tiny
from stabilizer_helpers import FLAGS, SMALL, block, build, layer_of, normal
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from quantization.stabilizers import QRampingAdamW, qramping
from quantization.stabilizers.qramping import periods
from record.checkpoint import load_checkpoint, save_checkpoint

pytestmark = pytest.mark.usefixtures("in_this_process")


# ---------------------------------------------------------------------------------------------------------------------
# Q-Ramping: periods
# ---------------------------------------------------------------------------------------------------------------------


def below(value: float) -> float:
    """The float32 before `value`."""
    return float(np.nextafter(np.float32(value), np.float32(0)))


@pytest.mark.parametrize(
    ("ratio", "k1", "k2", "n_max", "n"),
    [
        (0.0, 16, 5, 100, 1),
        (1.0, 16, 5, 100, 1),
        (below(16), 16, 5, 100, 1),
        (16.0, 16, 5, 100, 6),
        (below(32), 16, 5, 100, 6),
        (32.0, 16, 5, 100, 11),
        (47.9, 16, 5, 100, 11),
        (48.0, 16, 5, 100, 16),
        (below(304), 16, 5, 100, 91),
        (304.0, 16, 5, 100, 96),
        (320.0, 16, 5, 100, 100),  # not 101
        (1e30, 16, 5, 100, 100),
        (math.inf, 16, 5, 100, 100),
        (math.inf, 16, 0, 100, 1),
        (1e30, 16, 0, 100, 1),
        (64.0, 16, 3, 1, 1),
        (64.0, 16, 3, 12, 12),
        (64.0, 16, 3, 13, 13),
        (64.0, 16, 3, 14, 13),
        (below(20), 20, 4, 100, 1),
        (20.0, 20, 4, 100, 5),
        (1.24, 0.5, 5, 100, 11),
    ],
)
def test_the_period_of_a_ratio(ratio: float, k1: float, k2: int, n_max: int, n: int) -> None:
    """N_w = min(k2 floor(R_w / k1) + 1, N_max)."""
    found = periods(torch.tensor([[ratio, 0.0], [0.0, ratio]]), k1, k2, n_max)
    assert found.dtype == torch.int32 and found.tolist() == [[n, 1], [1, n]]


def test_an_epoch_is_the_default_of_period_and_cap() -> None:
    def figures(**keys: int) -> tuple[int, int, float, int, int]:
        s = build("qramping", layer_of(block()), epoch=17, **keys)
        return s.update_period, s.n_max, s.cfg.k1, s.cfg.k2, s.cfg.detect_steps

    assert figures() == (17, 17, 16.0, 5, 30)
    assert figures(update_period=3, n_max=40) == (3, 40, 16.0, 5, 30)


# ---------------------------------------------------------------------------------------------------------------------
# Q-Ramping: the optimizer
# ---------------------------------------------------------------------------------------------------------------------

SHAPES = [(7, 5), (33,), (16, 32), (3, 1)]  # the first three are ramped; the fourth has the same group, a fifth another


def two_optimizers(**options: Any) -> tuple[list[nn.Parameter], torch.optim.AdamW, list[nn.Parameter], QRampingAdamW]:
    """Equal parameters under torch's AdamW and ours: two groups, of which the first holds the ramped ones."""
    found: list[Any] = []
    for kind in (torch.optim.AdamW, QRampingAdamW):
        parameters = [nn.Parameter(normal(*shape, seed=i)) for i, shape in enumerate([*SHAPES, (11,)])]
        groups = [{"params": parameters[:4], "weight_decay": 0.1}, {"params": parameters[4:], "weight_decay": 0.0}]
        found += [parameters, kind(groups, **{"lr": 0.1, **options})]
    found[3].ramp(found[2][:3])
    return tuple(found)


def give_gradients(parameters: Sequence[nn.Parameter], step: int) -> None:
    for i, p in enumerate(parameters):
        p.grad = (normal(*p.shape, seed=100 * step + i + 50) * (1 + i) + 0.3).to(p.device)


@pytest.mark.parametrize(
    ("steps", "options", "reload"),
    [
        (50, {}, False),
        (50, {}, True),
        (50, {"betas": (0.8, 0.95), "eps": 1e-4}, True),
        (20, {"betas": (0.0, 0.5)}, False),
        (400, {}, False),
        (400, {"betas": (0.5, 0.9)}, False),  # 1 - .9^n is 1 from n = 349 on
    ],
    ids=str,
)
def test_with_period_1_it_is_torch_s_adamw_bit_for_bit(steps: int, options: dict[str, Any], reload: bool) -> None:
    """With weight decay, clipping, a rate that changes, and other parameters and groups beside the ramped ones."""
    theirs, adamw, ours, ramping = two_optimizers(**options)
    clipped = 0
    for step in range(steps):
        give_gradients(theirs, step)
        for p, q in zip(ours, theirs, strict=True):
            p.grad = q.grad.clone()
        for parameters, optimizer in ((theirs, adamw), (ours, ramping)):
            norm = nn.utils.clip_grad_norm_(parameters, 72.0)
            for n, group in enumerate(optimizer.param_groups):
                group["lr"] = (0.1, 0.01)[n] * (1.01 + math.cos(step / 7)) / 2
            optimizer.step()
            assert all(p.grad is not None for p in parameters)
            if reload and step % 10 == 4:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        clipped += bool(norm > 72)
        assert differences([p.data for p in theirs], [p.data for p in ours]) == [], step
    assert 0 < clipped < steps
    moments = torch.cat([adamw.state[p]["exp_avg_sq"].flatten() for p in theirs[:3]])
    assert torch.equal(moments, ramping.ramping["exp_avg_sq"])
    assert set(ramping.state) == set(ours[3:])
    assert ramping.ramping["updates"].unique().tolist() == [steps]
    # The control: one element of another period.
    n = [torch.ones(shape) for shape in SHAPES[:3]]
    n[1][7] = 2
    ramping.set_periods(n)
    for parameters, optimizer in ((theirs, adamw), (ours, ramping)):
        give_gradients(parameters, steps)
        optimizer.step()
    assert differences([p.data for p in theirs], [p.data for p in ours]) == ["/1"]
    assert (theirs[1] != ours[1]).nonzero().flatten().tolist() == [7]


def by_hand(
    w: float,
    gradients: Sequence[float],
    in_force: Sequence[int],
    rates: Sequence[float],
    *,
    betas: tuple[float, float],
    eps: float,
    decay: float,
    wrong: str = "",
) -> list[float]:
    """One weight, in float64: its values after every step. `in_force`: its period at each step."""
    values, total, count, n, m, v = [], 0.0, 0, 0, 0.0, 0.0
    for step, (g, period, rate) in enumerate(zip(gradients, in_force, rates, strict=True)):
        due = count + 1 >= period
        if wrong != "decay at updates" or due:
            w *= 1 - rate * decay
        total, count = total + g, count + 1
        if due:
            mean = g if wrong == "last gradient" else total if wrong == "sum" else total / count
            n += 1
            m = betas[0] * m + (1 - betas[0]) * mean
            v = betas[1] * v + (1 - betas[1]) * mean**2
            k = step + 1 if wrong == "correction by steps" else n
            scale = 1 if wrong == "rate not scaled" else period
            w -= scale * rate * (m / (1 - betas[0] ** k)) / (math.sqrt(v / (1 - betas[1] ** k)) + eps)
            total, count = 0.0, 0
        values.append(w)
    return values


WRONG = ["decay at updates", "last gradient", "sum", "correction by steps", "rate not scaled"]


def histories(steps: int) -> Tensor:
    """Periods in force (steps, 7, 5): mixed within the tensor, and changed at steps 11 and 29, amid accumulations."""
    draw = torch.Generator().manual_seed(3)
    first, second, third = (torch.randint(1, 10, (7, 5), generator=draw) for _ in range(3))
    first[0, 0], second[0, 0], third[0, 0] = 9, 2, 9  # shorter than the accumulation under way: ends at once
    first[0, 1], second[0, 1], third[0, 1] = 2, 9, 40  # longer: the one under way goes on
    return torch.stack([first if step < 11 else second if step < 29 else third for step in range(steps)])


@pytest.mark.parametrize("changing", [False, True], ids=["fixed periods", "changing periods"])
def test_a_period_is_an_accumulation_and_one_larger_step(changing: bool) -> None:
    steps = 60
    options = {"betas": (0.9, 0.97), "eps": 1e-3}
    _, _, parameters, optimizer = two_optimizers(**options)
    in_force = histories(steps) if changing else histories(steps)[:1].expand(steps, 7, 5)
    others = [torch.full(shape, n) for shape, n in ((SHAPES[1], 1), (SHAPES[2], 4))]
    rates = [0.02 * (1.1 + math.cos(step / 9)) for step in range(steps)]
    start = [p.detach().clone() for p in parameters]
    gradients, values = [], []
    for step in range(steps):
        give_gradients(parameters, step)
        gradients.append([p.grad.clone() for p in parameters])
        optimizer.param_groups[0]["lr"] = rates[step]
        if step == 0 or not torch.equal(in_force[step], in_force[step - 1]):
            assert bool(step and (optimizer.ramping["count"] > 0).any()) == bool(step)  # amid accumulations
            optimizer.set_periods([in_force[step], *others])
        optimizer.step()
        values.append([p.detach().clone() for p in parameters])

    def expected(i: int, index: tuple[int, ...], n: Sequence[int], wrong: str = "") -> Tensor:
        g = [step[i][index].item() for step in gradients]
        return torch.tensor(by_hand(start[i][index].item(), g, n, rates, **options, decay=0.1, wrong=wrong))

    def actual(i: int, index: tuple[int, ...]) -> Tensor:
        return torch.stack([step[i][index] for step in values])

    off = dict.fromkeys(WRONG, 0.0)
    for index in np.ndindex(7, 5):
        n = in_force[(slice(None), *index)].tolist()
        torch.testing.assert_close(actual(0, index), expected(0, index, n), rtol=0, atol=5e-6)
        for wrong in WRONG:
            off[wrong] = max(off[wrong], (actual(0, index) - expected(0, index, n, wrong)).abs().max().item())
    assert min(off.values()) > 1e-3, off  # the controls
    for i, index, period in ((1, (20,), 1), (2, (3, 30), 4)):
        torch.testing.assert_close(actual(i, index), expected(i, index, [period] * steps), rtol=0, atol=5e-6)


def test_the_size_of_a_chunk_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every parameter alone, of two and one, of all in one; a period and an accumulation may differ by element."""
    results = []
    for chunk in (1, 100, 10_000):
        monkeypatch.setattr(qramping, "CHUNK", chunk)
        _, _, parameters, optimizer = two_optimizers()
        optimizer.set_periods([torch.arange(math.prod(shape)).view(shape) % 9 + 1 for shape in SHAPES[:3]])
        for step in range(17):
            give_gradients(parameters, step)
            optimizer.step()
        results.append([[p.detach() for p in parameters], optimizer.state_dict()])
    assert results[0][1]["ramping"]["count"].unique().numel() == 6  # amid accumulations
    assert differences(results[0], results[1]) == differences(results[0], results[2]) == []


def ramped_steps(step: Callable[..., None], device: torch.device, betas: tuple[float, float], guarded: bool) -> Any:
    """Nine steps of mixed periods by `step`, the last of which fails where guarded. Weights, state, counts."""
    parameters = [nn.Parameter(normal(*shape, seed=i).to(device)) for i, shape in enumerate([(7, 5), (40, 33)])]
    optimizer = QRampingAdamW(parameters, lr=0.1, betas=betas, weight_decay=0.1)
    optimizer.ramp(parameters)
    optimizer.set_periods([torch.arange(p.numel(), device=device).view_as(p) % 4 + 1 for p in parameters])
    if guarded:
        optimizer.found_inf = torch.zeros((), device=device)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(qramping, "_kernel", lambda *_: step)
        for number in range(9):
            give_gradients(parameters, number)
            if guarded and number == 8:
                parameters[0].grad[0] = torch.nan
                optimizer.found_inf.fill_(1.0)
            optimizer.param_groups[0]["lr"] = 0.1 / (1 + number)
            optimizer.step()
    state = optimizer.ramping
    floats = [state[name] for name in ("exp_avg", "exp_avg_sq", "grad_sum")]
    return [p.detach() for p in parameters], floats, [state[name] for name in ("count", "updates", "period")]


@pytest.mark.gpu
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.9), (0.3, 0.0)], ids=str)
@pytest.mark.parametrize("guarded", [False, True], ids=["", "found_inf"])
def test_the_kernel_has_the_bits_of_torch_s_operations(guarded: bool, betas: tuple[float, float]) -> None:
    from quantization.backends.gpu.ramp import ramped_step

    results = [ramped_steps(s, torch.device("cuda"), betas, guarded) for s in (ramped_step, qramping._step_in_chunks)]
    # Any NaN equals any NaN; elsewhere all bits count.
    ours, theirs = ([t.cpu().nan_to_num(torch.inf).view(torch.int32) for t in tree_leaves(r)] for r in results)
    assert [torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)] == [True] * len(ours)


class Allocations(TorchDispatchMode):
    """The bytes of storages made under it: alive now, and the most that were at once."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.known = WeakIdKeyDictionary({t.untyped_storage(): 0 for t in known})
        self.alive = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for storage in (t.untyped_storage() for t in tree_leaves(out) if isinstance(t, Tensor)):
            if storage not in self.known:
                self.known[storage] = storage.nbytes()
                self.alive += storage.nbytes()
                weakref.finalize(storage, self.free, storage.nbytes())
        self.peak = max(self.peak, self.alive)
        return out

    def free(self, nbytes: int) -> None:
        self.alive -= nbytes


@pytest.mark.parametrize("guarded", [False, True], ids=["", "found_inf"])
def test_a_step_allocates_what_a_chunk_needs(guarded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Temporaries alive at once: some six floats for an element of a chunk, less than a float for one of them all."""
    monkeypatch.setattr(qramping, "CHUNK", 2**14, raising=False)
    parameters = [nn.Parameter(normal(128, 128, seed=i)) for i in range(12)]
    optimizer = QRampingAdamW(parameters, lr=0.1, betas=(0.5, 0.9))
    optimizer.ramp(parameters)
    optimizer.set_periods([torch.arange(p.numel()).view_as(p) % 4 + 1 for p in parameters])
    if guarded:
        optimizer.found_inf = torch.zeros(())
    peaks = []
    for step in range(6):
        give_gradients(parameters, step)
        held = [*parameters, *(p.grad for p in parameters), *optimizer.ramping.values()]
        with Allocations(*held) as allocations:
            optimizer.step()
        peaks.append(allocations.peak)
    assert 4 * 2**14 < max(peaks[1:]) < 6 * 4 * 2**14  # the control: it sees one chunk's at least
    # What is kept stays where it was, as a captured step needs it.
    kept = [t.data_ptr() for t in (*parameters, *optimizer.ramping.values())]
    optimizer.step()
    assert kept == [t.data_ptr() for t in (*parameters, *optimizer.ramping.values())]


def test_an_element_stands_still_between_its_updates() -> None:
    _, _, parameters, optimizer = two_optimizers()
    optimizer.param_groups[0]["weight_decay"] = 0.0
    n = torch.arange(35).view(7, 5) % 6 + 1
    optimizer.set_periods([n, *(torch.ones(shape) for shape in SHAPES[1:3])])
    moves = torch.zeros(7, 5, dtype=torch.int64)
    for step in range(60):
        before = parameters[0].detach().clone()
        give_gradients(parameters, step)
        optimizer.step()
        moved = parameters[0] != before
        assert torch.equal(moved, (step + 1) % n == 0)
        moves += moved
    assert torch.equal(moves, 60 // n)


def test_the_state_continues_bit_for_bit_amid_accumulations(tmp_path: Path) -> None:
    def continued(optimizer: QRampingAdamW, parameters: list[nn.Parameter]) -> list[Any]:
        for step in range(17, 40):
            give_gradients(parameters, step)
            optimizer.step()
        return [[p.detach().clone() for p in parameters], optimizer.state_dict()]

    def another(change: Callable[[dict[str, Any]], object] = lambda _: None) -> list[Any]:
        _, _, parameters, optimizer = two_optimizers(lr=0.5)  # the rate comes with the state
        state = load_checkpoint(tmp_path / "state.pt")
        change(state["optimizer"]["ramping"])
        optimizer.load_state_dict(state["optimizer"])
        with torch.no_grad():
            for p, saved in zip(parameters, state["model"], strict=True):
                p.copy_(saved)
        return continued(optimizer, parameters)

    _, _, parameters, optimizer = two_optimizers()
    optimizer.set_periods([torch.arange(math.prod(shape)).view(shape) % 9 + 1 for shape in SHAPES[:3]])
    for step in range(17):
        give_gradients(parameters, step)
        optimizer.step()
    assert optimizer.ramping["count"].unique().tolist() == [0, 1, 2, 3, 5, 8]  # 17 modulo 1 ... 9
    save_checkpoint(tmp_path / "state.pt", {"model": [p.data for p in parameters], "optimizer": optimizer.state_dict()})
    whole = continued(optimizer, parameters)
    assert differences(whole, another()) == []
    for name in ("exp_avg", "exp_avg_sq", "grad_sum", "count", "updates", "period"):  # the controls
        assert differences(whole[0], another(lambda ramping, name=name: ramping[name].mul_(2))[0]), name


def test_a_loaded_state_is_a_copy() -> None:
    _, _, parameters, optimizer = two_optimizers()
    state = optimizer.state_dict()
    optimizer.load_state_dict(state)
    give_gradients(parameters, 0)
    optimizer.step()
    assert not any(value.any() for name, value in state["ramping"].items() if name != "period")


def test_what_it_cannot_do_is_refused() -> None:
    _, _, parameters, optimizer = two_optimizers()
    stranger = nn.Parameter(torch.zeros(2))
    for wrong in ([parameters[0], parameters[4]], [parameters[0], stranger], [stranger]):
        with pytest.raises(ValueError, match="ramped parameters must all be in one parameter group"):
            optimizer.ramp(wrong)

    give_gradients(parameters, 0)
    parameters[1].grad = None
    before = [p.detach().clone() for p in parameters]
    with pytest.raises(ValueError, match="a ramped parameter has no gradient"):
        optimizer.step()
    assert differences(before, [p.data for p in parameters]) == []
    give_gradients(parameters, 0)
    parameters[3].grad = None  # others may lack theirs
    optimizer.step()
    changed = [not torch.equal(a, b) for a, b in zip(before, parameters, strict=True)]
    assert changed == [True, True, True, False, True]


def test_a_foreign_state_is_refused_and_changes_nothing() -> None:
    theirs, adamw, parameters, optimizer = two_optimizers()
    for each, one in ((theirs, adamw), (parameters, optimizer)):
        give_gradients(each, 0)
        one.step()
    before = copy.deepcopy(optimizer.state_dict())
    fewer = QRampingAdamW(parameters[:4])
    fewer.ramp(parameters[:2])
    one_group = QRampingAdamW(parameters)
    one_group.ramp(parameters[:3])
    for state in (adamw.state_dict(), fewer.state_dict(), one_group.state_dict()):
        with pytest.raises(ValueError, match=r"no periods for these parameters|different number of parameter groups"):
            optimizer.load_state_dict(state)
        assert differences(before, optimizer.state_dict()) == []
    optimizer.load_state_dict(before)


def test_a_checkpoint_without_periods_is_the_user_s_mistake(
    straight: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = load_checkpoint(straight("qramping") / "last.pt")
    del state["optimizer"]["ramping"]
    save_checkpoint(tmp_path / "cut.pt", state)
    capsys.readouterr()
    flags = [*SMALL, *FLAGS["qramping"], "--epochs", "3", "--resume", str(tmp_path / "cut.pt")]
    assert exit_code(tiny(tmp_path / "run", *flags)) == 2
    said = f"The optimizer state in {tmp_path / 'cut.pt'} does not fit --opt adamw: it holds no periods for these"
    assert capsys.readouterr().err == f"error: {said} parameters.\n"
