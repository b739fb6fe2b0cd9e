"""--eval: by which configuration a checkpoint is scored, its moving average, another resolution, what it needs."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from data_helpers import make_folder
from helpers import FULL, differences, exit_code, metrics, tiny, train
from stabilizer_helpers import captured

from record.checkpoint import load_checkpoint
from record.weights import load_weights

pytestmark = pytest.mark.usefixtures("in_this_process")

Score = Callable[..., tuple[str, str]]

MX = ["--quant.scheme", "mx", "--stabilizer.kind", "qema", "--stabilizer.decay", "0.8"]
OWN = ["--data.mean", "0.4", "0.5", "0.6", "--data.std", "0.2", "0.2", "0.3", "--eval-crop-ratio", "0.7"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose quantizers, shadows, means, deviations and crop are not the default's, with a moving average."""
    return train(tmp_path_factory.mktemp("trained") / "run", *FULL, *MX, *OWN, "--epochs", "1")


@pytest.fixture
def score(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Score:
    """What --eval prints of a checkpoint (that of `trained`), on stdout and on stderr."""

    def run(*flags: str, weights: Path = trained / "last.pt") -> tuple[str, str]:
        capsys.readouterr()
        assert exit_code(tiny(tmp_path / "none", "--eval", "--resume", str(weights), *flags)) == 0
        return capsys.readouterr()

    return run


def figures_of(folder: Path) -> str:
    logged = metrics(folder)[-2]["data"]
    return f"loss {logged['eval.loss']:.4f}, top1 {logged['eval.top1']:.2f} %, top5 {logged['eval.top5']:.2f} %"


def test_a_checkpoint_is_scored_by_its_own_recipe_where_the_command_does_not_say_otherwise(
    trained: Path, score: Score
) -> None:
    out, err = score()
    assert out == f"{trained / 'last.pt'}: {figures_of(trained)} on 6 images, quant.scheme mx, stabilizer.kind qema\n"
    assert err.startswith(
        f"note: {trained / 'last.pt'} is evaluated by its own configuration, quant.scheme mx (here none)"
    )
    assert err.count("\n") == 1
    assert score(*MX, *OWN) == (out, "")  # the command says the same: no word


OTHERS = {
    "scheme": ["--quant.scheme", "none", "--stabilizer.kind", "none"],
    "one key of the quantizers": ["--quant.scheme", "mx", "--quant.scale_rule", "floor"],
    "means": ["--data.mean", "0.5", "0.5", "0.5"],
    "deviations": ["--data.std", "0.5", "0.5", "0.5"],
    "crop": ["--eval-crop-ratio", "1.0"],
}


@pytest.mark.parametrize(
    ("flags", "key"),
    [
        (OTHERS["scheme"], "quant.scheme mx (here none)"),
        (OTHERS["one key of the quantizers"], "quant.scale_rule truncation_free (here floor)"),
        (OTHERS["means"], "data.mean [0.4, 0.5, 0.6] (here [0.5, 0.5, 0.5])"),
        (OTHERS["deviations"], "data.std [0.2, 0.2, 0.3] (here [0.5, 0.5, 0.5])"),
        (OTHERS["crop"], "data.eval_crop_ratio 0.7 (here 1.0)"),
    ],
    ids=OTHERS.keys(),
)
def test_a_flag_wins_and_the_difference_is_said(
    flags: list[str], key: str, trained: Path, tmp_path: Path, score: Score
) -> None:
    weights = trained / "last.pt"
    if "none" in flags:  # shadows have no place in a model without quantizers
        state = load_checkpoint(weights)
        state["model"] = {name: value for name, value in state["model"].items() if not name.endswith(".shadow")}
        weights = tmp_path / "plain.pt"
        torch.save(state, weights)
    out, err = score(*flags, weights=weights)
    assert figures_of(trained) not in out
    assert f"{weights} was trained with {key}" in err and "it is evaluated as the command says" in err


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"kwargs": {"num_heads": 1}}, "model.kwargs"),
        ({"kwargs": {"act_layer": "relu"}}, "model.kwargs"),
        ({"name": "deit3_small_patch16_224"}, "model.name deit3_small_patch16_224"),
        ({"patch_size": 8}, "model.patch_size 8"),
    ],
    ids=lambda value: str(value),
)
def test_another_model_that_the_weights_fit_is_said(
    change: dict, key: str, trained: Path, tmp_path: Path, score: Score
) -> None:
    """Heads and activations leave no trace in the shapes of weights."""
    state = load_checkpoint(trained / "last.pt")
    own = yaml.safe_load(state["config"])
    own["model"] |= change
    torch.save({**state, "config": yaml.safe_dump(own)}, tmp_path / "other.pt")
    _, err = score(*MX, *OWN, weights=tmp_path / "other.pt")
    assert err.count("\n") == 1 and f"other.pt was trained with {key}" in err
    assert "it is evaluated as the command says" in err


def test_a_file_of_another_method_does_not_change_the_score(trained: Path, tmp_path: Path, score: Score) -> None:
    other = tmp_path / "other.yaml"
    other.write_text("quant: {scheme: int4}\ndata: {mean: [0.5, 0.5, 0.5]}\n")
    out, err = score("--config", str(other))
    assert figures_of(trained) in out and "quant.scheme mx (here int4)" in err and " more.\n" in err


def test_weights_without_a_configuration_are_scored_as_the_command_says(
    trained: Path, tmp_path: Path, score: Score
) -> None:
    torch.save(load_weights(trained / "last.pt"), tmp_path / "weights.pt")
    out, err = score(*MX, *OWN, weights=tmp_path / "weights.pt")
    assert figures_of(trained) in out and err == ""


@pytest.mark.parametrize("key", ["ema", "model_ema", "state_dict_ema"])
def test_the_moving_average_is_scored_beside_the_weights(key: str, trained: Path, tmp_path: Path, score: Score) -> None:
    state = load_checkpoint(trained / "last.pt")
    state[key] = state.pop("ema")
    torch.save(state, tmp_path / "file.pt")
    logged = metrics(trained)[-2]["data"]
    out, _ = score("--model-ema", weights=tmp_path / "file.pt")
    assert f"{figures_of(trained)}, ema_loss {logged['eval.ema_loss']:.4f}, ema_top1 " in out
    assert logged["eval.ema_loss"] != pytest.approx(logged["eval.loss"], rel=1e-4)


def test_a_file_without_a_moving_average_is_refused_for_it(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(load_weights(trained / "last.pt"), tmp_path / "weights.pt")
    flags = [*MX, "--eval", "--model-ema", "--resume", str(tmp_path / "weights.pt")]
    assert exit_code(tiny(tmp_path / "none", *flags)) == 2
    assert "holds no moving average" in capsys.readouterr().err


@pytest.mark.parametrize("of_ours", [True, False], ids=["checkpoint", "weights"])
def test_another_resolution_is_resampled(of_ours: bool, trained: Path, tmp_path: Path, score: Score) -> None:
    weights = trained / "last.pt"
    if not of_ours:
        torch.save(load_weights(weights), weights := tmp_path / "weights.pt")
    out, err = score(*MX, *OWN, "--input-size", "16", weights=weights)
    assert re.fullmatch(rf"{re.escape(str(weights))}: loss [\d.]+, top1 .* on 6 images, .*\n", out)
    assert f"{weights} is resampled to images of 16 pixels" in err


def test_resampling_does_not_make_another_model_fit(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--eval", "--resume", str(trained / "last.pt"), "--input-size", "16"]
    for more in (["--nb-classes", "7"], ["--model.kwargs", "{embed_dim: 32, depth: 3, num_heads: 2}"]):
        assert exit_code(tiny(tmp_path / "none", *flags, *more)) == 2
        assert "is the checkpoint of another model" in capsys.readouterr().err


HELD_OUT = {  # by the share held out in training: flags of --eval, and what is said of the difference
    "the same": (0.25, ["--val-split", "0.25"], ""),
    "none asked": (0.25, [], "held out by --val-split 0.25, and is scored here on those of val/; add --val-split 0.25"),
    "more": (0.25, ["--val-split", "0.5"], "was trained with --val-split 0.25, so it has seen images that --val-split"),
    "fewer": (0.5, ["--val-split", "0.25"], "was trained with --val-split 0.5, of whose images --val-split 0.25 takes"),
    "none held out": (None, ["--val-split", "0.5"], "was trained without --val-split, so it has seen images that"),
    "neither": (None, [], ""),
}


@pytest.mark.parametrize(("share", "flags", "said"), HELD_OUT.values(), ids=HELD_OUT.keys())
def test_other_images_than_the_run_has_held_out_are_said(
    share: float | None, flags: list[str], said: str, tmp_path: Path, score: Score
) -> None:
    images = make_folder(tmp_path / "images", train=20)
    data = ["--data-set", "imagenet", "--data-path", str(images), "--nb-classes", "2", "--no-repeated-aug"]
    held_out = [] if share is None else ["--val-split", str(share)]
    run = train(tmp_path / "run", *data, *held_out, "--epochs", "1")
    out, err = score(*data, *flags, weights=run / "last.pt")
    assert (said in err and err.count("\n") == 1) if said else err == ""
    assert (figures_of(run) in out) == (flags == held_out)


@pytest.mark.parametrize("batch", ["1", "7", "4096"])
def test_it_needs_the_evaluation_set_alone_and_any_batch_will_do(
    batch: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = make_folder(tmp_path / "images", train=8)
    flags = ["--data-set", "imagenet", "--data-path", str(images), "--nb-classes", "2", "--epochs", "1"]
    folder = train(tmp_path / "run", *flags, "--no-repeated-aug")
    shutil.rmtree(images / "train")
    capsys.readouterr()
    evaluate = ["--eval", "--resume", str(folder / "last.pt"), "--global-batch", batch, "--opt", "nonsense"]
    assert exit_code(tiny(tmp_path / "none", *flags, *evaluate)) == 0
    assert f"{figures_of(folder)} on 8 images" in capsys.readouterr().out


@pytest.mark.parametrize("average", [True, False], ids=["the average", "the weights"])
def test_fine_tuning_starts_from_the_weights_or_from_their_average(
    average: bool, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = trained / "last.pt"
    flags = [*MX, "--model-ema", "--finetune", str(given), *["--use-ema"] * average]
    run = captured(monkeypatch, tmp_path / "run", *flags)
    assert differences(dict(run.model.state_dict()), load_weights(given, average=average)) == []
    assert differences(dict(run.ema.module.state_dict()), dict(run.model.state_dict())) == []


def test_a_file_without_an_average_is_refused_where_it_is_to_be_tuned(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(load_weights(trained / "last.pt"), tmp_path / "weights.pt")
    assert exit_code(tiny(tmp_path / "run", "--finetune", str(tmp_path / "weights.pt"), "--use-ema")) == 2
    assert "holds no moving average" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_checkpoint_is_scored_under_delayed_outer_scales_it_was_not_trained_with_and_without_its_own(
    trained: Path, score: Score, tmp_path: Path
) -> None:
    """They hang from magnitudes that a checkpoint may not have, or that a model has no use for."""
    weights = load_weights(trained / "last.pt")
    layers = [name.removesuffix("shadow") for name in weights if name.endswith(".shadow")]
    held = {f"{layer}held": torch.ones(3, 2) for layer in layers}
    torch.save({**weights, **held}, tmp_path / "held.pt")
    delayed = ["--quant.scale_format", "e4m3", "--quant.outer", "pow2", "--quant.outer_delay", "3"]
    without = score(*MX, *OWN)[0]
    under_present = score(*MX, *OWN, *delayed)[0]
    assert under_present.split(": ")[1] != without.split(": ")[1]
    assert score(*MX, *OWN, weights=tmp_path / "held.pt")[0].split(": ")[1] == without.split(": ")[1]
