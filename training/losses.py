"""The training loss: (label-smoothed, mixed or binary) cross-entropy from timm, and DeiT's distillation around it."""

from __future__ import annotations

import timm
import torch
import torch.nn.functional as F
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

from config import Config, UserError
from record.weights import load_weights, restore_model


class Loss(nn.Module):
    """Loss of one batch: `forward(images, outputs, targets)` -> scalar, in float32 whatever the outputs' dtype.

    With distillation (Touvron et al. 2021), outputs are the pair (class head, distillation head) and the loss is
    (1 - alpha) * base(class head) + alpha * distillation(distillation head, teacher(images)).
    """

    def __init__(self, cfg: Config, *, mixed_targets: bool, teacher: nn.Module | None) -> None:
        super().__init__()
        smoothing = cfg.loss.smoothing
        if cfg.loss.bce:
            # Without smoothing every class present in a mixed image counts as present, as in DeiT III.
            self.base = BinaryCrossEntropy(
                smoothing=0.0 if mixed_targets else smoothing, target_threshold=None if smoothing else 0.0
            )
        elif mixed_targets:
            self.base = SoftTargetCrossEntropy()  # mixup smooths the targets itself
        else:
            self.base = LabelSmoothingCrossEntropy(smoothing) if smoothing else nn.CrossEntropyLoss()
        self.teacher, self.distillation = teacher, cfg.distillation

    def forward(self, images: Tensor, outputs: Tensor | tuple[Tensor, Tensor], targets: Tensor) -> Tensor:
        if self.teacher is None:
            return self.base(outputs.float(), targets)
        class_logits, distillation_logits = (o.float() for o in outputs)
        with torch.no_grad():
            teacher_logits = self.teacher(images).float()
        if self.distillation.type == "hard":
            distillation = F.cross_entropy(distillation_logits, teacher_logits.argmax(dim=1))
        else:
            tau = self.distillation.tau
            distillation = (
                F.kl_div(
                    F.log_softmax(distillation_logits / tau, dim=1),
                    F.log_softmax(teacher_logits / tau, dim=1),
                    reduction="sum",
                    log_target=True,
                )
                * (tau * tau)
                / distillation_logits.numel()
            )
        alpha = self.distillation.alpha
        return (1 - alpha) * self.base(class_logits, targets) + alpha * distillation


def build_loss(cfg: Config, model: nn.Module, *, num_classes: int, mixed_targets: bool, device: torch.device) -> Loss:
    """The loss of a configuration; loads the teacher where there is distillation.

    Raises UserError where the model has no distillation token, or the teacher is missing, unknown or of other shapes.
    """
    d = cfg.distillation
    if d.type == "none":
        return Loss(cfg, mixed_targets=mixed_targets, teacher=None)
    if not hasattr(model, "set_distilled_training"):
        raise UserError(
            f"Distillation needs a model with a distillation token; {cfg.model.name} has none, "
            "deit_tiny_distilled_patch16_224 has."
        )
    if d.teacher_path is None:
        raise UserError("Distillation needs the teacher's checkpoint; pass --teacher-path FILE.")
    if not timm.is_model(d.teacher_model):
        raise UserError(f"There is no teacher model {d.teacher_model} in timm.")
    weights = load_weights(d.teacher_path)
    teacher = timm.create_model(d.teacher_model, num_classes=num_classes)
    try:
        restore_model(teacher, weights, d.teacher_path)
    except UserError:
        raise UserError(
            f"{d.teacher_path} does not fit the teacher {d.teacher_model} with {num_classes} classes; check "
            "--teacher-model and --teacher-path."
        ) from None
    model.set_distilled_training(True)
    return Loss(cfg, mixed_targets=mixed_targets, teacher=teacher.to(device).eval().requires_grad_(False))
