"""Compares logits and lists of two commits to the bit: each in a worktree of its own, on one thread.

python tools/compare_commits.py BEFORE AFTER [--shared FOLDER]
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
PROBE = Path(__file__).with_name("probe.py")


@contextmanager
def worktree(commit: str, folder: Path) -> Iterator[Path]:
    """A detached worktree of a commit, which is removed at the end."""
    subprocess.run(["git", "-C", ROOT, "worktree", "add", "--quiet", "--detach", folder, commit], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", folder], check=True)


def build_kernels(source: Path, build: Path) -> dict[str, str]:
    """Builds the native kernels of a worktree.

    Returns:
        The variable that names the library; nothing where this machine has no kernels.
    """
    subprocess.run(["cmake", "-S", source, "-B", build], check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["cmake", "--build", build, "--parallel"], check=True, stdout=subprocess.DEVNULL)
    library = build / "_native.so"
    if not library.exists():
        print(f"{source.name}: there are no native kernels for this machine", file=sys.stderr)
        return {}
    return {"SPARSIFINER_LIBRARY": str(library)}


def probe(commit: str, folder: Path, name: str, shared: Path | None) -> Path:
    """What the models of a commit give.

    Args:
        commit: the commit.
        folder: holds the probe; worktree, kernels, adapters and results are made in it.
        name: of the commit's files there.
        shared: folder with trained runs, or None.

    Returns:
        The file of results.
    """
    output, adapters = folder / f"{name}.safetensors", folder / "adapters"
    adapters.mkdir(exist_ok=True)
    with worktree(commit, folder / name) as tree:
        environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("SPARSIFINER_")},
            **build_kernels(tree, folder / f"build-{name}"),
            "OMP_NUM_THREADS": "1",
        }
        trained = [] if shared is None else ["--shared", shared.resolve()]
        arguments = [folder / PROBE.name, tree / "src", output, adapters, *trained]
        command = [sys.executable, *map(str, arguments)]
        subprocess.run(command, check=True, env=environment)
    return output


def read(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and refusals of a probe."""
    with safe_open(file, framework="pt") as results:
        tensors = {key: results.get_tensor(key) for key in results.keys()}  # noqa: SIM118
        return tensors, json.loads(results.metadata()["refusals"])


def difference(before: Tensor | None, after: Tensor | None) -> str | None:
    """What two tensors differ in, None where they are equal to the bit."""
    if before is None or after is None:
        return "missing " + ("before" if before is None else "after")
    if before.shape != after.shape or before.dtype != after.dtype:
        return f"{before.dtype} {list(before.shape)} -> {after.dtype} {list(after.shape)}"
    if torch.equal(before.view(torch.uint8), after.view(torch.uint8)):
        return None
    if not before.is_floating_point():
        return f"{int((before != after).sum())} of {before.numel()} keys differ"
    return f"differ by up to {(before.double() - after.double()).abs().max():.3g}"


def compare(before: Path, after: Path) -> int:
    """Prints a row for each model and setting.

    Returns:
        How many of them differ.
    """
    (tensors, refused), (others, refused_after) = read(before), read(after)
    names = sorted(tensors.keys() | others.keys())
    parts = {key: list(group) for key, group in groupby(names, key=lambda name: name.rpartition("|")[0])}
    different = both = 0
    for key in sorted({*parts, *refused, *refused_after}):
        found = {name: difference(tensors.get(name), others.get(name)) for name in parts.get(key, [])}
        told = [f"{name.rpartition('|')[2]}: {text}" for name, text in found.items() if text is not None]
        if (key in refused) != (key in refused_after):
            side = "before" if key in refused else "after"
            told.insert(0, f"refused {side}: {(refused | refused_after)[key]}")
        different += bool(told)
        both += key in refused and not told
        same = "refused by both" if key in refused else f"equal ({len(found)} tensors)"
        model, setting = key.split("|")
        print(f"{model:52} {setting:42} {'DIFFERENT: ' + '; '.join(told) if told else same}")
    equal = len({*parts, *refused, *refused_after}) - different - both
    print(f"{equal} models with a setting are equal, {both} are refused by both, {different} differ")
    return different


def main() -> int:
    """Exit code 1 where anything differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("before", help="a commit")
    parser.add_argument("after", help="another one")
    parser.add_argument("--shared", type=Path, help="folder with trained runs in checkpoints/runs")
    options = parser.parse_args()
    if options.shared is not None and not (options.shared / "checkpoints" / "runs").is_dir():
        parser.error(f"--shared {options.shared} has no folder checkpoints/runs; give one that has, or none")
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(PROBE, folder)  # both run the same, whatever is edited meanwhile
        commits = {"before": options.before, "after": options.after}
        files = [probe(commit, Path(folder), name, options.shared) for name, commit in commits.items()]
        return int(compare(*files) > 0)


if __name__ == "__main__":
    sys.exit(main())
