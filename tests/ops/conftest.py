"""Programs are made anew for every test: some change what they are made of besides their key."""

import pytest
import torch

from sparsifiner.ops.program import forget_programs


@pytest.fixture(autouse=True)
def _forgotten_programs():
    forget_programs()
    yield
    forget_programs()


@pytest.fixture
def poisoned(monkeypatch):
    """What kernels do not write shows: fresh memory holds NaN, also as workspace."""
    empty, empty_strided = torch.empty, torch.empty_strided

    def poison(tensor):
        if tensor.is_floating_point():
            return tensor.fill_(torch.nan)
        # of the workspace, which is bytes, every float is NaN
        return tensor.fill_(255 if tensor.dtype == torch.uint8 else -12345)

    monkeypatch.setattr(torch, "empty", lambda *args, **options: poison(empty(*args, **options)))
    monkeypatch.setattr(
        torch, "empty_strided", lambda *args, **options: poison(empty_strided(*args, **options))
    )
