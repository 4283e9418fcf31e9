"""Fits scorers with weights to the attention of the dense twin, on a few images without labels."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm

from sparsifiner.models.adapter import is_scorer
from sparsifiner.training.recipe import STAGE_KINDS
from sparsifiner.training.stages import Student, Teacher, why_skipped

_KIND = STAGE_KINDS["reconstruct"]
_LR = 5e-3
_LAST_LR = 2e-4


def fit_scorers(model: nn.Module, batches: Sequence[Tensor], steps: int, *, progress: bool = True) -> bool:
    """Lets the scorers learn the dense attention, as the stage "reconstruct" does; the backbone stays.

    Args:
        model: a sparse model in evaluation mode; a scorer without weights is left as it is.
        batches: images [B, 3, H, W] where the model is, taken in turn.
        steps: optimizer steps, with a learning rate that falls along a cosine.
        progress: show a progress bar on a terminal.

    Returns:
        Whether there was something to fit.
    """
    if steps == 0 or why_skipped(model, _KIND):
        return False
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    teacher, student = Teacher(model), Student(model, _KIND).eval()
    weights = [parameter for name, parameter in model.named_parameters() if is_scorer(name)]
    optimizer = torch.optim.AdamW(weights, lr=_LR)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, _LAST_LR)
    bar = tqdm(range(steps), desc="fitting", unit="step", disable=None if progress else True, leave=False)
    try:
        with torch.enable_grad():
            for step in bar:
                images = batches[step % len(batches)]
                loss = student(images, teacher(images, projections=True).projections)["reconstruct"]
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trainable[name])
            parameter.grad = None
    return True
