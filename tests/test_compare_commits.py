"""tools/compare_commits.py tells what differs between two commits, a bit included."""

import importlib.util
import json

import pytest
import torch
from safetensors.torch import save_file


@pytest.fixture
def compare(checkout):
    path = checkout / "tools" / "compare_commits.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.compare


RESULTS = {
    "deit|fast|logits": torch.tensor([1.0, torch.nan, 0.0]),
    "deit|fast|lists of layer 0": torch.arange(6, dtype=torch.int32),
}


@pytest.mark.parametrize(
    ("changed", "refusals", "told"),
    [
        ({}, {"deit|paper": "no"}, "1 models with a setting are equal, 1 are refused by both, 0 differ"),
        ({"deit|fast|logits": torch.tensor([1.0, torch.nan, -0.0])}, {"deit|paper": "no"}, "up to"),
        (
            {"deit|fast|lists of layer 0": torch.tensor([0, 1, 2, 4, 3, 5], dtype=torch.int32)},
            {"deit|paper": "no"},
            "lists of layer 0: 2 of 6 keys differ",
        ),
        ({"deit|fast|logits": torch.zeros(2)}, {"deit|paper": "no"}, "[3] -> torch.float32 [2]"),
        ({"deit|pooled|logits": torch.zeros(2)}, {"deit|paper": "no"}, "logits: missing before"),
        ({"deit|paper|logits": torch.zeros(2)}, {}, "refused before: no"),
    ],
)
def test_every_difference_is_told_and_counted(compare, changed, refusals, told, tmp_path, capsys):
    for name, tensors, refused in (
        ("before", RESULTS, {"deit|paper": "no"}),
        ("after", {**RESULTS, **changed}, refusals),
    ):
        save_file(tensors, tmp_path / name, {"refusals": json.dumps(refused)})
    assert compare(tmp_path / "before", tmp_path / "after") == bool(changed)
    assert told in capsys.readouterr().out
