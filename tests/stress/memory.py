"""Memory limits while models are made sparse, called and calibrated: no signal ends the process.

`python -m tests.stress.memory --trials 20`. A trial is a process of one thread with a limit on its address
space; where it fails with an error, the limit is lifted and the same model must go on to the same result.
"""

import argparse
import os
import random
import resource
import subprocess
import sys
from collections import Counter

import torch

import sparsifiner
from sparsifiner.calibration.budgets import calibrate
from tests.models import make_model

TASKS = ("sparsify", "forward", "calibrate")
PRESETS = ("fast", "paper")


def used_bytes() -> int:
    """Address space of this process."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def do(task: str, preset: str, model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Does the task and returns what tells its result."""
    torch.manual_seed(1)
    if task == "sparsify":
        sparsifiner.sparsify(model, preset=preset, keep=0.2)
    if task == "calibrate":
        calibrate(model, [images[:1]], fit_steps=5, progress=False)
    with torch.no_grad():
        return model(images)


def attempt(task: str, preset: str, megabytes: int | None) -> tuple[torch.Tensor, str]:
    """The result, reached under a limit or, after an error, without it; and how the limited try ended."""
    torch.manual_seed(0)
    model = make_model("deit", img_size=512, depth=3, embed_dim=192)
    images = torch.randn(4, 3, 512, 512)
    if task != "sparsify":
        sparsifiner.sparsify(model, preset=preset, keep=0.2)
    if megabytes is None:
        return do(task, preset, model, images), "finished"
    unlimited = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used_bytes() + megabytes * 2**20, unlimited[1]))
    try:
        return do(task, preset, model, images), "finished"
    except (MemoryError, RuntimeError) as error:
        ended = type(error).__name__
    finally:
        resource.setrlimit(resource.RLIMIT_AS, unlimited)
    return do(task, preset, model, images), ended


def trial(task: str, preset: str, megabytes: int) -> None:
    """One trial, in this process."""
    torch.set_num_threads(1)
    expected, _ = attempt(task, preset, None)
    actual, ended = attempt(task, preset, megabytes)
    assert torch.equal(actual, expected), f"after {ended} the model is another one"
    print(ended)


def run(trials: int, seed: int) -> Counter[tuple[str, str, str]]:
    """Makes so many trials; returns how many ended how.

    Raises:
        AssertionError: a process ended by a signal, or its model was another one afterwards.
    """
    draw, outcomes = random.Random(seed), Counter()
    for index in range(trials):
        task, preset = TASKS[index % len(TASKS)], PRESETS[index // len(TASKS) % len(PRESETS)]
        megabytes = draw.choice((0, 1, 2, 4, 8, 16, 32, 64, 128, 256))
        program = f"from tests.stress.memory import trial; trial({task!r}, {preset!r}, {megabytes})"
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", program],
            env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        ended = done.stdout.strip()
        print(f"{task:10} {preset:6} {megabytes:4} MiB: {ended or done.returncode}", flush=True)
        assert done.returncode == 0, done.stderr[-2000:]
        outcomes[task, preset, ended] += 1
    return outcomes


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    outcomes = run(options.trials, options.seed)
    finished = sum(count for (_, _, ended), count in outcomes.items() if ended == "finished")
    print(
        f"{options.trials} trials: {finished} finished, the others raised and then ran; no signal ended one"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
