"""What benchmarks/ takes for granted about the package."""

import importlib
import pathlib
import re

import pytest

from sparsifiner.geometry.grid import TokenLayout

ROOT = pathlib.Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("checkout")


def test_every_kernel_that_is_timed_exists(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    work = importlib.import_module("gpu_kernels").work
    sources = [file.read_text() for file in (ROOT / "src" / "sparsifiner" / "ops").rglob("*.py")]
    defined = {name for source in sources for name in re.findall(r"^def (\w+_kernel)\(", source, re.M)}
    timed = set(work(TokenLayout((32, 32)), batch=1, budget=103))
    assert len(timed) == 7
    assert timed <= defined
