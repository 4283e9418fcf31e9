"""The one rule for intermediate precision."""

import contextlib

import torch


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64 inputs, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Inside, operations compute in the dtypes that they are given, whatever autocast says."""
    # a device without it, such as "meta", has nothing to switch off, and switching takes time
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)
