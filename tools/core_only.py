"""Imports, sparsifies, calibrates on tensors and runs, as who has torch, timm and safetensors alone does."""

import sys

import sparsifiner

assert "torch" not in sys.modules, "import sparsifiner must not cost torch"

import timm  # noqa: E402, behind the check
import torch  # noqa: E402

# laboratory and command line come with extras
for extra in ("accelerate", "datasets", "jsonargparse", "matplotlib", "sklearn", "tensorboard"):
    try:
        __import__(extra)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{extra} is installed; give an environment without extras")

model = timm.create_model("vit_tiny_patch16_224", img_size=96, depth=2, embed_dim=48, num_heads=3).eval()
images = torch.randn(4, 3, 96, 96)
for options in ({"keep": 0.3, "tile": 2}, {"preset": "paper", "keep": 0.3}):
    sparsifiner.sparsify(model, **options)
    report = sparsifiner.calibrate(model, [images], fit_steps=3, progress=False)
    with torch.no_grad(), sparsifiner.trace(model) as layers:
        logits = model(images)
    assert logits.isfinite().all()
    assert report.error <= report.error_before
    print(options, tuple(logits.shape), "keys of each layer:", report.budgets, f"{len(layers)} layers traced")
