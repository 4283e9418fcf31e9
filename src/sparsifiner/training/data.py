"""Training batches that depend on the seed alone: not on workers, processes or where a run resumed."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from timm.data import Mixup, create_transform, resolve_data_config
from timm.data.mixup import mixup_target
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from sparsifiner.hosts import image_size_of
from sparsifiner.training.recipe import Recipe

# what a seed is for
ORDER, AUGMENT, MIX, DROP = range(4)

Transform = Callable[[Image.Image], Tensor]


@dataclass(frozen=True)
class Share:
    """The part of every batch that one process computes.

    Attributes:
        rank: index of the process.
        processes: number of processes.
        accumulate: parts that a process computes one after another.
    """

    rank: int = 0
    processes: int = 1
    accumulate: int = 1

    @property
    def parts(self) -> int:
        """Parts that a batch is divided into."""
        return self.processes * self.accumulate

    def check(self, batch_size: int) -> None:
        """Rejects batches that cannot be divided.

        Raises:
            ValueError: `batch_size` is not a multiple of twice the number of parts.
        """
        if batch_size % (2 * self.parts):
            below = batch_size // (2 * self.parts) * 2 * self.parts
            raise ValueError(
                f"batch_size={batch_size} is divided among {self.processes} processes x {self.accumulate} "
                f"parts, each of which mixes pairs of images, so it must be a multiple of {2 * self.parts}; "
                f"use {f'{below} or ' if below else ''}{below + 2 * self.parts}"
            )


class BatchSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, image) from one step of a stage to its end, one list per part.

    A part takes images from the front of its batch and their mirror images from its back. Mixup pairs
    image i with image -1 - i, so partners share a part, and the batch is mixed in the same way
    however many parts it has.

    Args:
        images: number of training images.
        batch_size: images per optimizer step, over all processes.
        epochs: passes over the images; what does not fill a batch is left out of its epoch.
        share: the part of this process.
        seed: what orders the images.
        first_step: step to start at, counted from the start of the stage.
    """

    def __init__(
        self,
        images: int,
        batch_size: int,
        epochs: int,
        share: Share,
        seed: Sequence[int],
        first_step: int = 0,
    ) -> None:
        share.check(batch_size)
        self.images = images
        self.batch_size = batch_size
        self.share = share
        self.seed = seed
        self.first_step = first_step
        self.steps_per_epoch = images // batch_size
        self.steps = epochs * self.steps_per_epoch

    def __len__(self) -> int:
        return (self.steps - self.first_step) * self.share.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        half = self.batch_size // self.share.parts // 2
        order: list[int] = []
        for step in range(self.first_step, self.steps):
            epoch, batch = divmod(step, self.steps_per_epoch)
            if batch == 0 or step == self.first_step:
                generator = torch.Generator().manual_seed(derive_seed(*self.seed, ORDER, epoch))
                order = torch.randperm(self.images, generator=generator).tolist()
            members = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            mirrored = members[::-1]
            for part in range(self.share.accumulate):
                start = (self.share.rank * self.share.accumulate + part) * half
                pairs = members[start : start + half], mirrored[start : start + half]
                yield [(epoch, image) for image in pairs[0] + pairs[1][::-1]]


class AugmentedImages(Dataset[tuple[Tensor, int]]):
    """Images under a random transform that depends on the seed, the epoch and the image alone.

    Args:
        images: an `ImageSet` or a subset of one.
        transform: from a PIL image to [3, H, W]; it may draw from Python's, NumPy's and torch's generators.
        seed: what else decides what is drawn.
    """

    def __init__(
        self, images: Dataset[tuple[Image.Image, int]], transform: Transform, seed: Sequence[int]
    ) -> None:
        self.images = images
        self.transform = transform
        self.seed = seed

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = item
        image, label = self.images[index]
        seed_generators(*self.seed, AUGMENT, epoch, index)
        return self.transform(image), label


class Mixer:
    """timm's mixup and cutmix, drawn per step; soft targets also without them.

    Args:
        recipe: alphas and smoothing.
        num_classes: number of classes.
    """

    def __init__(self, recipe: Recipe, num_classes: int) -> None:
        self.num_classes = num_classes
        self.smoothing = recipe.label_smoothing
        self.mixup = None
        if recipe.mixup > 0 or recipe.cutmix > 0:
            self.mixup = Mixup(
                mixup_alpha=recipe.mixup,
                cutmix_alpha=recipe.cutmix,
                prob=recipe.mixup_prob,
                switch_prob=recipe.mixup_switch,
                label_smoothing=recipe.label_smoothing,
                num_classes=num_classes,
            )

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mixes [B, 3, H, W] in place; returns it and the targets [B, classes]."""
        if self.mixup is None:
            return images, mixup_target(labels, self.num_classes, smoothing=self.smoothing)
        images, targets = self.mixup(images, labels)
        return images, targets


def training_transform(model: nn.Module, recipe: Recipe) -> Transform:
    """timm's training transform for the model's input size.

    Args:
        model: a timm model; its `pretrained_cfg` fills in what the recipe leaves open.
        recipe: the augmentation.

    Raises:
        ValueError: timm does not know the policy or the filter.
    """
    size = image_size_of(model)
    overrides = {"mean": recipe.mean, "std": recipe.std, "interpolation": recipe.interpolation}
    config = resolve_data_config(overrides | {"input_size": size and (3, *size)}, model=model)
    try:
        transform = create_transform(
            config["input_size"],
            is_training=True,
            scale=recipe.crop_scale,
            hflip=recipe.hflip,
            color_jitter=recipe.color_jitter,
            auto_augment=recipe.auto_augment,
            interpolation=config["interpolation"],
            mean=config["mean"],
            std=config["std"],
            re_prob=recipe.erasing,
            re_mode="pixel",
        )
    except (AssertionError, LookupError) as error:
        raise ValueError(
            f"auto_augment={recipe.auto_augment!r} is no policy of timm, or interpolation="
            f"{recipe.interpolation!r} no filter; the paper takes rand-m9-mstd0.5-inc1 and bicubic"
        ) from error
    return cast("Transform", transform)


def training_loader(
    images: Dataset[tuple[Image.Image, int]], transform: Transform, sampler: BatchSampler, workers: int
) -> DataLoader[Any]:
    """Loader of a stage's parts of batches: images fp32 [b, 3, H, W] and labels int64 [b]."""
    augmented = AugmentedImages(images, transform, sampler.seed)
    return DataLoader(
        augmented, batch_sampler=sampler, num_workers=workers, pin_memory=torch.cuda.is_available()
    )


def derive_seed(*parts: int) -> int:
    """One 32-bit seed from several numbers."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def seed_generators(*parts: int) -> None:
    """Seeds Python's, NumPy's and torch's generators of the host, which transforms and mixing draw from."""
    seed = derive_seed(*parts)
    random.seed(seed)
    np.random.seed(seed)
    # where CUDA has not started, torch.manual_seed keeps a stack trace of every call for later
    torch.default_generator.manual_seed(seed)
