import os
import pathlib

import pytest
import torch

from tests.matrix import (  # noqa: F401, hooks of pytest
    pytest_addoption,
    pytest_collection_modifyitems,
    pytest_configure,
)

# pytest-xdist runs one process per core
torch.set_num_threads(1)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not torch.cuda.is_available():
    # kernels read this when they are defined: without a GPU they are interpreted
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def checkout():
    """The repository; source distributions lack docs, benchmarks and configs."""
    root = pathlib.Path(__file__).parents[1]
    missing = [name for name in ("docs", "benchmarks", "configs") if not (root / name).is_dir()]
    if missing:
        pytest.skip(f"{', '.join(missing)}: not here, but in the repository")
    return root


@pytest.fixture
def shared():
    """The project's shared data beside the checkout; users do not have it."""
    folder = pathlib.Path(__file__).parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("the shared folder with fixtures and data is not here")
    return folder
