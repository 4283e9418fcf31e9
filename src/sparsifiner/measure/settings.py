"""Rules that the settings of all benchmarks share."""

import contextlib
import re
from collections.abc import Iterator, Mapping
from numbers import Integral
from typing import Any, Literal

import torch

Precision = Literal["bf16", "fp16", "fp32"]
DTYPES: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# side of square images in pixels, or "HEIGHTxWIDTH"
ImageSize = int | str

_LEAST = {"batch_size": 1, "threads": 1, "runs": 2, "warmup": 0, "seed": 0}


def check_settings(settings: Any, least: Mapping[str, int]) -> None:
    """Rejects an unknown dtype and numbers that are too small.

    Args:
        settings: a dataclass of settings.
        least: the least value of more fields; None stands for torch's choice.

    Raises:
        TypeError: a field that counts something is no whole number.
        ValueError: a value is impossible.
    """
    if settings.dtype not in DTYPES:
        raise ValueError(f"dtype={settings.dtype!r} is unknown; choose one of {', '.join(DTYPES)}")
    for name, smallest in {**_LEAST, **least}.items():
        value = getattr(settings, name)
        values = value if isinstance(value, list) else [value]
        if not values:
            raise ValueError(f"{name} must hold at least one number, got an empty list")
        for each in values:
            if each is None and name == "threads":
                continue
            if isinstance(each, bool) or not isinstance(each, Integral):
                raise TypeError(f"{name} must be a whole number of at least {smallest}, got {each!r}")
            if each < smallest:
                raise ValueError(f"{name} must be at least {smallest}, got {each}; raise it")


def sides_of(size: ImageSize) -> tuple[int, int]:
    """Height and width in pixels.

    Raises:
        ValueError: it is no size of an image.
    """
    matched = re.fullmatch(r"(\d+)(?:x(\d+))?", str(size))
    height, width = (int(side) for side in (matched[1], matched[2] or matched[1])) if matched else (0, 0)
    if height < 1 or width < 1:
        raise ValueError(
            f"img_size={size!r} is no size of an image; give its side in pixels, as 512, or height and "
            "width, as '1024x2048'"
        )
    return height, width


def one_for_each(name: str, value: Any, of: str, count: int) -> list[Any]:
    """A value for each of `count` cases, of which one number gives all the same.

    Raises:
        ValueError: there are more or fewer values than cases.
    """
    values = list(value) if isinstance(value, list | tuple) else [value]
    if len(values) == 1:
        return values * count
    if len(values) != count:
        raise ValueError(
            f"{name} has {len(values)} entries, but {of} has {count}; give one number, or one per {of}"
        )
    return values


@contextlib.contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """Inside, torch computes with `count` threads; None changes nothing."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
