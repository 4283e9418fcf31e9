"""Turns labelled images into batches: timm's evaluation transform and a deterministic loader."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from sparsifiner.hosts import image_size_of


def evaluation_transform(
    model: nn.Module,
    *,
    img_size: int | tuple[int, int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    crop_pct: float | None = None,
    interpolation: str | None = None,
) -> Callable[[Image.Image], Tensor]:
    """timm's evaluation transform: resize, center crop, normalize.

    Args:
        model: a timm model; its `pretrained_cfg` and current input size fill in what is None.
        img_size: side, or height and width, of the result in pixels.
        mean: three channel means in [0, 1].
        std: three channel standard deviations.
        crop_pct: share of the resized image that the crop keeps, in (0, 1].
        interpolation: "bicubic", "bilinear" or another of Pillow's filters.

    Returns:
        Transform from a PIL RGB image to a normalized fp32 tensor [3, H, W].

    Raises:
        ValueError: an override is impossible.
    """
    size = image_size_of(model) if img_size is None else img_size
    sides = (size, size) if isinstance(size, int) else size
    if sides is not None and (len(sides) != 2 or min(sides) < 1):
        raise ValueError(f"img_size must be a side, or height and width, in pixels; got {img_size!r}")
    for name, values in (("mean", mean), ("std", std)):
        if values is not None and len(values) != 3:
            raise ValueError(f"{name} must have 3 numbers, one per RGB channel; got {values!r}")
    if std is not None and min(std) <= 0:
        raise ValueError(f"std must be positive, got {std!r}")
    if crop_pct is not None and not 0 < crop_pct <= 1:
        raise ValueError(f"crop_pct must lie in (0, 1], got {crop_pct!r}; 1 keeps the whole resized image")
    filters = [name.lower() for name in Image.Resampling.__members__]
    if interpolation is not None and interpolation not in filters:
        raise ValueError(f"interpolation={interpolation!r} is unknown; choose one of {', '.join(filters)}")
    overrides = {"mean": mean, "std": std, "crop_pct": crop_pct, "interpolation": interpolation}
    overrides["input_size"] = sides and (3, *sides)
    config = resolve_data_config(overrides, model=model)
    return cast("Callable[[Image.Image], Tensor]", create_transform(**config, is_training=False))


def make_loader(
    dataset: Dataset[tuple[Image.Image, int]],
    transform: Callable[[Image.Image], Tensor],
    batch_size: int,
    *,
    workers: int = 0,
    **options: Any,
) -> DataLoader[Any]:
    """Loader of batches (images fp32 [B, 3, H, W], labels int64 [B]).

    Args:
        dataset: an `ImageSet` or a subset of one.
        transform: applied to each image, in the workers.
        batch_size: images per batch.
        workers: worker processes; 0 reads in this one. Batches and their order do not depend on it.
        **options: further arguments of `DataLoader`; without any, the order is that of `dataset`.

    Raises:
        ValueError: a number is impossible. Iterating raises `UnreadableImageError`.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if workers < 0:
        raise ValueError(f"workers must be at least 0, got {workers}; 0 reads in the main process")
    collate = functools.partial(_collate, transform)
    return DataLoader(dataset, batch_size, num_workers=workers, collate_fn=collate, **options)


def _collate(
    transform: Callable[[Image.Image], Tensor], batch: list[tuple[Image.Image, int]]
) -> tuple[Tensor, Tensor]:
    images, labels = zip(*batch, strict=True)
    return torch.stack([transform(image) for image in images]), torch.tensor(labels)
