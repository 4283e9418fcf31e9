"""Bytes that a function needs on a GPU for as long as it runs."""

import gc
from collections.abc import Callable

import torch


def scratch_bytes(function: Callable[[], object], device: torch.device | str) -> int | None:
    """Peak memory of a function beyond what was there before and beyond its result.

    Args:
        function: called twice; the first time libraries allocate what they keep.
        device: where it computes.

    Returns:
        Bytes as torch's allocator counts them; None on a CPU, where nothing counts them.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return None
    function()
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = function()
    torch.cuda.synchronize(device)
    scratch: int = torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device)
    del result
    return scratch
