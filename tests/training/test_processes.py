"""Two processes compute what one does with the same batch, through the launcher that users have."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from sparsifiner.cli import main

SOURCES = pathlib.Path(__file__).parents[2] / "src"
MODEL = '{"patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 2}'
STAGES = "[{name: reconstruct, epochs: 1, lr: 3e-3}, {name: joint, epochs: 1, lr: 1e-3}]"
OPTIONS = [
    *(
        "train",
        "--data",
        "digits",
        "--model",
        "deit_tiny_patch16_224",
        "--img-size",
        "32",
        "--model-args",
        MODEL,
    ),
    *("--preset", "paper", "--keep", "0.5", "--stages", STAGES, "--limit", "48", "--validation-limit", "21"),
    *("--batch-size", "8", "--ema-decay", "0.9", "--clip-grad", "1.0", "--log-every", "2", "--workers", "0"),
    *("--device", "cpu"),
]


def launch(*options):
    # `accelerate launch` starts several processes on GPUs only; torchrun does on CPUs too
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"PYTHONPATH": str(SOURCES), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, "-m", "sparsifiner", *options],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.filterwarnings("ignore:the low-rank scorer is untrained")
def test_two_processes_equal_one(tmp_path, capsys):
    alone, together = tmp_path / "alone", tmp_path / "together"
    assert main([*OPTIONS, "--output", str(alone)]) == 0
    done = launch(*OPTIONS, "--output", str(together))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("batch     8 images = 2 processes x 1 parts x 4 images") == 1
    for name in ("last", "last_ema", "best", "adapter"):
        ours, theirs = (load_file(folder / f"{name}.safetensors") for folder in (alone, together))
        assert ours.keys() == theirs.keys()
        for key, tensor in ours.items():
            assert (tensor.double() - theirs[key].double()).abs().max() < 1e-5, (name, key)
    records = [
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (alone, together)
    ]
    assert len(records[0]) == len(records[1]) == 2 * (3 + 1)
    for ours, theirs in zip(*records, strict=True):
        assert ours.keys() == theirs.keys()
        words = {name for name, value in ours.items() if isinstance(value, str)}
        assert all(ours[name] == theirs[name] for name in words)
        for name in ours.keys() - words - {"seconds", "images_per_second"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-5), name
