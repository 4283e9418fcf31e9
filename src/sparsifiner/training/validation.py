"""How good a model is while it trains, measured by all processes together."""

import itertools
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import Subset

from sparsifiner.data import ImageSet, evaluation_transform, make_loader
from sparsifiner.measure.recall import mask_recall
from sparsifiner.training.data import Share
from sparsifiner.training.recipe import Recipe

_RECALL_IMAGES = 32


class Validation:
    """Validation images, divided among the processes.

    Args:
        accelerator: the processes.
        model: says how images are prepared.
        images: to validate on.
        recipe: says how, too.
        share: the part of this process.
    """

    def __init__(
        self, accelerator: Accelerator, model: nn.Module, images: ImageSet, recipe: Recipe, share: Share
    ) -> None:
        self.accelerator = accelerator
        transform = evaluation_transform(
            model,
            mean=recipe.mean,
            std=recipe.std,
            crop_pct=recipe.crop_pct,
            interpolation=recipe.interpolation,
        )
        part = Subset(images, range(share.rank, len(images), share.processes))
        self.loader = make_loader(
            part,
            transform,
            recipe.batch_size // share.parts,
            workers=recipe.workers,
            persistent_workers=recipe.workers > 0,
        )
        some = Subset(images, range(min(_RECALL_IMAGES, len(images))))
        self.some: list[Any] | None = None
        if accelerator.is_main_process:
            self.some = list(itertools.islice(make_loader(some, transform, _RECALL_IMAGES), 1))

    @torch.no_grad()
    def top1(self, model: nn.Module) -> float:
        """Percent of all images whose label is the first class; all processes call this."""
        device = self.accelerator.device
        counts = torch.zeros(2, dtype=torch.int64, device=device)
        for images, labels in self.loader:
            with self.accelerator.autocast():
                predicted = model(images.to(device, non_blocking=True)).argmax(1)
            counts[0] += (predicted == labels.to(device)).sum()
            counts[1] += len(labels)
        total: Tensor = self.accelerator.reduce(counts, "sum")
        hits, seen = total.tolist()
        return 100.0 * int(hits) / int(seen)

    def recall(self, model: nn.Module) -> float | None:
        """Mean mask recall over layers, of the first images; None for dense models and other processes."""
        if self.some is None:
            return None
        with self.accelerator.autocast():
            layers = mask_recall(model, self.some, device=self.accelerator.device)
        return sum(layers) / len(layers) if layers else None
