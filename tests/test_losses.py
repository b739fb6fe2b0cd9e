"""The losses against formulas written out by hand; distillation, in a run and in what it lacks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import FULL, before_step, column, differences, replace, train
from torch import Tensor, nn

import engine
from config import UserError, load_config
from engine import Run
from models import create_model
from record.weights import load_weights
from training.losses import Loss, build_loss

pytestmark = pytest.mark.usefixtures("in_this_process")


def make_loss(*overrides: str, mixed: bool = False, teacher: nn.Module | None = None) -> Loss:
    return Loss(load_config(overrides=overrides), mixed_targets=mixed, teacher=teacher)


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Logits (6, 5), labels (6,), soft targets (6, 5) as mixup makes them."""
    draw = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(6, 5, generator=draw) * 3, torch.tensor([0, 4, 2, 2, 1, 3])
    smooth = F.one_hot(labels, 5) * 0.9 + 0.02
    return logits, labels, 0.3 * smooth + 0.7 * smooth.flip(0)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
def test_label_smoothing_is_that_of_torch(smoothing: float, batch: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, labels, _ = batch
    ours = make_loss(f"loss.smoothing={smoothing}")(None, logits, labels)
    torch.testing.assert_close(ours, nn.CrossEntropyLoss(label_smoothing=smoothing)(logits, labels))


def test_mixed_targets_give_the_cross_entropy_of_soft_targets(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, _, soft = batch
    by_hand = -(soft * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(make_loss(mixed=True)(None, logits, soft), by_hand)
    torch.testing.assert_close(make_loss(mixed=True)(None, logits, soft), nn.CrossEntropyLoss()(logits, soft))


def by_hand_bce(logits: Tensor, targets: Tensor) -> Tensor:
    p = logits.sigmoid()
    return -(targets * p.log() + (1 - targets) * (1 - p).log()).mean()


def test_binary_cross_entropy(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, labels, soft = batch
    hard = F.one_hot(labels, 5).float()
    bce = "loss.bce=true"
    torch.testing.assert_close(
        make_loss(bce, "loss.smoothing=0.1")(None, logits, labels), by_hand_bce(logits, hard * 0.9 + 0.02)
    )
    torch.testing.assert_close(make_loss(bce, "loss.smoothing=0")(None, logits, labels), by_hand_bce(logits, hard))
    torch.testing.assert_close(
        make_loss(bce, "loss.smoothing=0.1", mixed=True)(None, logits, soft), by_hand_bce(logits, soft)
    )
    mixed = 0.3 * hard + 0.7 * hard.flip(0)  # without smoothing, as in DeiT III: every class in the image is present
    torch.testing.assert_close(
        make_loss(bce, "loss.smoothing=0", mixed=True)(None, logits, mixed), by_hand_bce(logits, (mixed > 0).float())
    )


class Teacher(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, :5].cos() * 4


def test_distillation_is_that_of_deit(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    class_logits, labels, _ = batch
    images = torch.randn(6, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    token_logits = class_logits.flip(1) * 0.5
    teacher = Teacher()(images)
    base = nn.CrossEntropyLoss(label_smoothing=0.1)(class_logits, labels)

    def loss(*overrides: str) -> Tensor:
        values = [f"distillation.{override}" for override in overrides]
        return make_loss(*values, teacher=Teacher())(images, (class_logits, token_logits), labels)

    hard = F.cross_entropy(token_logits, teacher.argmax(1))
    torch.testing.assert_close(loss("type=hard", "alpha=0.3"), 0.7 * base + 0.3 * hard)
    for tau in (1.0, 3.0):
        p = (teacher / tau).softmax(1)
        kl = (p * (p.log() - (token_logits / tau).log_softmax(1))).sum() * tau**2 / (6 * 5)
        torch.testing.assert_close(loss("type=soft", "alpha=0.3", f"tau={tau}"), 0.7 * base + 0.3 * kl)
    torch.testing.assert_close(loss("type=soft", "alpha=0"), base)


def test_losses_are_in_float32_whatever_the_outputs_are(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, labels, _ = batch
    assert make_loss()(None, logits.bfloat16(), labels).dtype == torch.float32
    pair = (logits.bfloat16(), logits.bfloat16())
    loss = make_loss("distillation.type=hard", teacher=Teacher())(torch.zeros(6, 3, 2, 2), pair, labels)
    assert loss.dtype == torch.float32


DISTILLED = ["--model", "deit_tiny_distilled_patch16_224", "--teacher-model", "test_resnet", "--lr", "0.001"]


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("teacher") / "teacher.pth"
    torch.save({"model": timm.create_model("test_resnet", num_classes=4).state_dict()}, path)
    return path


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_a_distilled_model_trains(kind: str, teacher_file: Path, tmp_path: Path, monkeypatch: Any) -> None:
    runs: list[Run] = []
    replace(monkeypatch, engine.train_step, before_step(0, runs.append))
    flags = [*FULL, *DISTILLED, "--epochs", "1", "--distillation-type", kind, "--teacher-path", str(teacher_file)]
    train(tmp_path / "run", *flags)
    model, teacher = runs[0].model, runs[0].loss.teacher
    torch.manual_seed(0)
    before = create_model(runs[0].cfg, 4).state_dict()
    for name in ("head.weight", "head_dist.weight", "dist_token", "blocks.0.attn.qkv.weight"):
        assert not torch.equal(model.state_dict()[name], before[name]), name
    assert not teacher.training
    assert differences(dict(teacher.state_dict()), load_weights(teacher_file)) == []
    assert all(math.isfinite(loss) for loss in column(tmp_path / "run", "train.loss"))
    model.eval()
    images = torch.zeros(2, 3, 8, 8)
    assert model(images).shape == (2, 4)  # evaluation takes the mean of the two heads


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["model.name=deit_tiny_patch16_224"],
            r"Distillation needs a model with a distillation token; deit_tiny_\S+ has ",
        ),
        (["distillation.teacher_path=null"], "pass --teacher-path FILE"),
        (["distillation.teacher_model=resnet1000"], "no teacher model resnet1000 in timm"),
        (["distillation.teacher_path=nowhere.pth"], "There is no checkpoint nowhere.pth"),
        (
            ["distillation.teacher_model=test_vit"],
            "does not fit the teacher test_vit with 4 classes; check --teacher-model",
        ),
    ],
)
def test_distillation_says_what_it_lacks(overrides: list[str], words: str, teacher_file: Path) -> None:
    given = ["distillation.type=soft", f"distillation.teacher_path={teacher_file}", "model.img_size=8"]
    given += ["model.name=deit_tiny_distilled_patch16_224", "distillation.teacher_model=test_resnet"]
    given += ["model.patch_size=4", "model.kwargs={embed_dim: 32, depth: 1, num_heads: 2}"]
    cfg = load_config(overrides=[*given, *overrides])
    with pytest.raises(UserError, match=words):
        build_loss(cfg, create_model(cfg, 4), num_classes=4, mixed_targets=False, device=torch.device("cpu"))
