"""Runs that take a moment, and whether two of them left the same."""

import json

import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer

from sparsifiner.data import open_images
from sparsifiner.training import Recipe, Stage, train


def train_tiny(folder, *, resume=False, **options):
    """A dense model, four steps in two epochs, a checkpoint after each."""
    torch.manual_seed(1)
    model = VisionTransformer(
        img_size=16, patch_size=4, depth=1, embed_dim=16, num_heads=2, num_classes=10, drop_path_rate=0.1
    )
    defaults = {"stages": [Stage("classify", 2, lr=3e-3)], "batch_size": 8, "log_every": 1, "workers": 0}
    return train(
        model,
        open_images("digits", "train", limit=16),
        open_images("digits", limit=8),
        Recipe(**{**defaults, "checkpoint_every": 1, **options}),
        folder,
        resume=resume,
        device="cpu",
        progress=False,
    )


def checkpoints_of(folder):
    """Names of the checkpoints of a run, in their order."""
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def digests_of(folder):
    """What every file in a folder holds, links as where they lead."""
    return {
        path.relative_to(folder): path.readlink() if path.is_symlink() else path.read_bytes()
        for path in folder.rglob("*")
        if path.is_symlink() or path.is_file()
    }


def without_times(records):
    clocks = ("seconds", "images_per_second")
    return [{name: value for name, value in record.items() if name not in clocks} for record in records]


def weights_of(folder):
    return {file.stem: load_file(file) for file in folder.glob("*.safetensors")}


def records_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_equal_runs(folder, other):
    """Weights and measurements are equal to the bit, times aside."""
    assert without_times(records_of(folder)) == without_times(records_of(other))
    weights, expected = weights_of(folder), weights_of(other)
    assert weights.keys() == expected.keys() >= {"best", "last"}
    for name, tensors in weights.items():
        assert tensors.keys() == expected[name].keys()
        assert all(torch.equal(tensor, expected[name][key]) for key, tensor in tensors.items()), name
