"""Peak memory of one training step of both stages over N and k, each in a fresh process.

python benchmarks/training_memory.py
"""

import argparse
import json
import resource
import subprocess
import sys
import warnings

import timm
import torch
from provenance import RESULTS, append_rows, provenance

import sparsifiner
from sparsifiner.training import LossWeights
from sparsifiner.training.recipe import STAGE_KINDS
from sparsifiner.training.stages import Student, Teacher, compute_losses, total_loss

PATCH = 4
DEPTH = 4
BATCH = 2
# pixels, keep: three sizes, then three lengths of the lists at the middle one
SETTINGS = [(64, 0.1), (128, 0.1), (192, 0.1), (128, 0.05), (128, 0.2), (128, 0.4)]


def peak_mib() -> float:
    """Largest memory of this process so far, in MiB: on the GPU if there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(stage: str, backend: str, pixels: int, keep: float) -> None:
    warnings.simplefilter("ignore")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = STAGE_KINDS[stage]
    model = timm.create_model(
        "deit_tiny_patch16_224", img_size=pixels, patch_size=PATCH, depth=DEPTH, num_classes=200
    ).to(device)
    if backend != "dense":
        sparsifiner.sparsify(model, preset="paper", keep=keep, backend=backend)
    teacher, student = Teacher(model), Student(model, kind).train()
    images = torch.randn(BATCH, 3, pixels, pixels, device=device)
    targets = torch.full((BATCH, 200), 1 / 200, device=device)
    weights = torch.randn(64, 64, device=device, requires_grad=True)
    torch.autograd.grad((weights @ weights).sum(), weights)  # loads libraries
    before = peak_mib()
    taught = teacher(images, projections="reconstruct" in kind.losses)
    losses = compute_losses(kind, student(images, taught.projections), taught, targets)
    torch.autograd.backward(total_loss(losses, LossWeights()))
    print(json.dumps({"step_mib": peak_mib() - before}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", nargs=4, metavar=("STAGE", "BACKEND", "PIXELS", "KEEP"))
    options = parser.parse_args()
    if options.measure:
        stage, backend, pixels, keep = options.measure
        measure(stage, backend, int(pixels), float(keep))
        return
    for stage in ("reconstruct", "distil"):
        backends = ("torch",) if stage == "reconstruct" else ("dense", "torch")
        for backend in backends:
            for pixels, keep in SETTINGS:
                if backend == "dense" and keep != 0.1:
                    continue
                arguments = [stage, backend, str(pixels), str(keep)]
                command = [sys.executable, __file__, "--measure", *arguments]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                tokens = (pixels // PATCH) ** 2 + 1
                row = {"stage": stage, "backend": backend, "tokens": tokens, "keep": keep}
                row["keys"] = tokens if backend == "dense" else -(-int(1000 * keep) * tokens // 1000)
                row |= {"batch": BATCH, "depth": DEPTH, "dtype": "fp32"}
                row |= json.loads(done.stdout.splitlines()[-1])
                device = "cuda" if torch.cuda.is_available() else "cpu"
                append_rows(RESULTS / "training_memory.json", [row | provenance(device)])
                print(f"{stage:12} {backend:10} N {tokens:5} k {row['keys']:5} {row['step_mib']:8.0f} MiB")


if __name__ == "__main__":
    main()
