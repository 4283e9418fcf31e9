"""Peak memory of one forward of DeiT-S at 1024 px (N = 4097), each backend in a fresh process.

python benchmarks/memory.py
"""

import argparse
import json
import resource
import subprocess
import sys
import warnings
from typing import Any

import timm
import torch
from provenance import RESULTS, append_rows, provenance

import sparsifiner

SETTING: dict[str, Any] = {"keep": 0.1, "tile": 8, "summary": 8, "scorer": "impact", "profile": "falling"}
PIXELS = 1024


def peak_mib() -> float:
    """Largest resident size of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(backend: str, depth: int) -> None:
    warnings.simplefilter("ignore")
    model = timm.create_model("deit_small_patch16_224", img_size=PIXELS, depth=depth).eval()
    if backend != "dense":
        sparsifiner.sparsify(model, **SETTING, backend=backend)
    image = torch.randn(1, 3, PIXELS, PIXELS)
    with torch.inference_mode():
        model.patch_embed(image)  # loads the matrix libraries
        before = peak_mib()
        model(image)
    print(json.dumps({"before_mib": before, "peak_mib": peak_mib(), "forward_mib": peak_mib() - before}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", help="measure this one here, instead of all in fresh processes")
    parser.add_argument("--depth", type=int, default=12)
    options = parser.parse_args()
    if options.backend:
        measure(options.backend, options.depth)
        return
    for backend in ("dense", "reference", "torch", "cpu"):
        command = [sys.executable, __file__, "--backend", backend, "--depth", str(options.depth)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        row = {"tokens": 4097, "batch": 1, "dtype": "fp32", **SETTING, "backend": backend}
        row |= json.loads(done.stdout.splitlines()[-1])
        append_rows(RESULTS / "memory.json", [row | provenance("cpu")])
        print(
            f"{backend:10} forward {row['forward_mib']:8.0f} MiB   whole process {row['peak_mib']:8.0f} MiB"
        )


if __name__ == "__main__":
    main()
