"""Runs sparse models of one source tree and saves their logits and lists, for `compare_commits.py`.

python tools/probe.py SOURCE OUTPUT ADAPTERS [--shared FOLDER]
"""

import argparse
import importlib
import json
import sys
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

# four layers, of which two share lists; heads of 64, or of what a model says
SMALL = {"depth": 4, "embed_dim": 192, "num_heads": 3, "num_classes": 10}
# name -> (timm name, arguments); grids of 10 x 10, or 7 x 7, which no tile divides
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "deit": ("deit_tiny_patch16_224", {"img_size": 160}),
    "deit distilled": ("deit_tiny_distilled_patch16_224", {"img_size": 160}),
    "augreg patch 32": ("vit_small_patch32_224", {"img_size": 224, "num_heads": 6}),
    "clip tower": ("vit_base_patch16_clip_224", {"img_size": 160, "num_heads": 12}),
    "siglip tower": ("vit_base_patch16_siglip_224", {"img_size": 160}),
    "dinov2 registers": ("vit_small_patch14_reg4_dinov2", {"img_size": 140}),
    "deit3": ("deit3_small_patch16_224", {"img_size": (160, 112), "num_heads": 6}),
    "internvit dynamic": ("vit_intern300m_patch14_448", {"img_size": 140, "dynamic_img_size": True}),
    "qk norm": ("deit_tiny_patch16_224", {"img_size": 112, "qk_norm": True, "scale_attn_norm": True}),
    "average pooling": ("vit_base_patch16_gap_224", {"img_size": 160}),
    "post norm": ("vit_base_patch16_rpn_224", {"img_size": 160}),
    "lv-vit": ("lvvit_s", {"img_size": 160}),
}
SCORERS = ("lowrank", "impact", "pooled", "oracle", "window", "strided", "random", "bigbird")
FAST: dict[str, Any] = {"preset": "fast", "keep": 0.2}
PAPER: dict[str, Any] = {"preset": "paper", "keep": 0.25}
# of adapters that the commit before wrote, in the table
BY_ADAPTER = "adapter of the commit before"
# fields of SparsifyConfig in the settings of a run, where they are called otherwise
RUN_FIELDS = {"seed": "scorer_seed"}
# of a run's settings, those that the preset leaves open
RUN_OPTIONS = (
    *("keep", "profile", "tile", "summary", "scorer", "pool", "share", "backend", "min_tokens"),
    *("basis", "reduced_dim", "coef_topk", "basis_threshold", "seed"),
)


def settings(library: Any) -> dict[str, dict[str, Any]]:
    """Arguments of `sparsify`, by what they are called in the table."""
    tiles = {"keep": 0.2, "tile": 4, "summary": 2}
    chosen: dict[str, dict[str, Any]] = {"fast": FAST, "paper": PAPER}
    for scorer in SCORERS:
        chosen[f"{scorer}, tiles"] = {**tiles, "scorer": scorer}
        chosen[f"{scorer}, list per query"] = {**PAPER, "scorer": scorer}
    for name, options in (("fast", FAST), ("paper", PAPER)):
        chosen[f"{name}, share 2"] = {**options, "share": 2}
        chosen[f"{name}, keep per layer"] = {**options, "keep": [0.5, 0.3, 0.2, 0.1]}
        chosen[f"{name}, stays dense"] = {**options, "min_tokens": 1000}
        for backend in ("reference", "torch"):
            chosen[f"{name}, {backend}"] = {**options, "backend": backend}
    chosen["fast, even"] = {**FAST, "profile": "even"}
    chosen["fast, tile 1"] = {**FAST, "tile": 1}
    chosen["fast, tile 3"] = {**FAST, "tile": 3}
    chosen["fast, pool 1"] = {**FAST, "pool": 1}
    chosen["fast, pool of the whole tile"] = {**FAST, "pool": 8}
    chosen["fast, no summaries"] = {**FAST, "tile": 4, "summary": None}
    for summary in (2, 3, 8):
        chosen[f"fast, summary {summary}"] = {**FAST, "tile": 4, "summary": summary}
        chosen[f"paper, summary {summary}"] = {**PAPER, "summary": summary}
    chosen["paper, tile 4"] = {**PAPER, "tile": 4}
    chosen["paper, basis 64"] = {**PAPER, "basis": 64, "coef_topk": 16, "reduced_dim": 16}
    chosen["released"] = {**PAPER, "legacy": True}
    methods = {
        "EViT": library.EViT(0.7),
        "EViT, not fused": library.EViT(0.5, fuse=False),
        "DynamicViT": library.DynamicViT(0.7),
        "DynamicViT after attention": library.DynamicViT(0.6, "after attention", at=(0, 2)),
        "ToMe": library.ToMe(4),
    }
    for method, tokens in methods.items():
        for name, options in (("fast", FAST), ("paper", PAPER), ("tiles", tiles), ("dense", {"keep": 1.0})):
            chosen[f"{name}, {method}"] = {**options, "tokens": tokens}
    return chosen


@torch.no_grad()
def shake(model: nn.Module, size: float, part: str = "") -> None:
    """Adds noise to parameters, each by its own name: timm's zeros and ones would hide differences."""
    for name, parameter in model.named_parameters():
        if part in name:
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))


def make_dense(name: str) -> nn.Module:
    """One of `MODELS`, its weights random, the same in every process."""
    timm_name, arguments = MODELS[name]
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(timm_name, **{**SMALL, **arguments}).eval()
    shake(model, 0.05)
    return model


def make_images(size: int | tuple[int, int], batch: int = 2) -> Tensor:
    """Random images [batch, 3, H, W], the same in every process."""
    height, width = (size, size) if isinstance(size, int) else size
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def runs_of(shared: Path) -> Iterator[tuple[str, nn.Module, dict[str, Any], dict[str, Tensor], Tensor]]:
    """Trained runs: name, dense model, arguments of `sparsify`, weights and images."""
    for folder in sorted((shared / "checkpoints" / "runs").iterdir()):
        run = yaml.safe_load((folder / "config.yaml").read_text())
        weights = {key: value.float() for key, value in load_file(folder / "last.safetensors").items()}
        options = {name: run.get(RUN_FIELDS.get(name, name)) for name in RUN_OPTIONS}
        given = {name: value for name, value in options.items() if value is not None}
        size = {} if run["img_size"] is None else {"img_size": run["img_size"]}
        classes = len(weights["head.bias"])
        model = timm.create_model(run["model"], **size, **(run["model_args"] or {}), num_classes=classes)
        images = make_images(run["img_size"] or 224)
        yield folder.name, model.eval(), {"preset": run["preset"], **given}, weights, images


class Probe:
    """Runs models and collects what they give.

    Args:
        library: the package sparsifiner.
        adapters: folder of adapters; those that are there are loaded, others are written.
    """

    def __init__(self, library: Any, adapters: Path) -> None:
        self.library = library
        self.adapters = adapters
        self.tensors: dict[str, Tensor] = {}
        self.refusals: dict[str, str] = {}

    @torch.inference_mode()
    def add(self, name: str, setting: str, model: nn.Module, images: Tensor) -> None:
        """Logits of a call without a trace, lists of a call with one.

        Raises:
            RuntimeError: logits are not finite, which would hide differences.
        """
        key = f"{name}|{setting}"
        logits = model(images).contiguous()
        if not logits.isfinite().all():
            raise RuntimeError(f"{name}, {setting}: logits are not finite; give the model other weights")
        self.tensors[f"{key}|logits"] = logits
        if setting == "dense":
            return
        with self.library.trace(model) as layers:
            model(images)
        for layer, record in sorted(layers.items()):  # layers that share lists share their memory
            self.tensors[f"{key}|lists of layer {layer}"] = record.connectivity.indices.clone().contiguous()

    def add_settings(self, name: str, images: Tensor) -> None:
        """Every setting on one model; what does not go with it is noted."""
        self.add(name, "dense", make_dense(name), images)
        for setting, options in settings(self.library).items():
            model = make_dense(name)
            try:
                self.library.sparsify(model, **options)
            except ValueError as error:
                self.refusals[f"{name}|{setting}"] = str(error)
                continue
            shake(model, 0.1, ".scorer.")
            shake(model, 0.1, ".reducer.")
            self.add(name, setting, model, images)

    def add_calibrated(self, name: str, images: Tensor) -> None:
        """Both presets calibrated, as a model and by an adapter."""
        if "calibrate" in self.library.__all__:
            calibrate = self.library.calibrate
        else:  # before it was public
            calibrate = importlib.import_module("sparsifiner.training.calibration").calibrate
        for preset, options in (("fast", FAST), ("paper", PAPER)):
            model = self.library.sparsify(make_dense(name), **options)
            shake(model, 0.1, ".scorer.")
            calibrate(model, [images], fit_steps=3, progress=False)
            self.add(name, f"{preset}, calibrated", model, images)
            adapter = self._adapter(model, f"{name} {preset}")
            loaded = self.library.load_adapter(make_dense(name), adapter)
            self.add(name, f"{preset}, {BY_ADAPTER}", loaded, images)

    def add_trained(self, shared: Path) -> None:
        """Trained runs as their settings say, and their scorers by an adapter."""
        for name, model, options, weights, images in runs_of(shared):
            self.library.sparsify(model, **options)
            # the grids of scorers are no floats
            state = {key: weights[key].to(value.dtype) for key, value in model.state_dict().items()}
            model.load_state_dict(state)
            self.add(name, "trained", model, images)
            adapter = self._adapter(model, name)
            self.library.desparsify(model)
            self.add(name, "dense", model, images)
            self.add(name, BY_ADAPTER, self.library.load_adapter(model, adapter), images)

    def _adapter(self, model: nn.Module, name: str) -> Path:
        """The adapter of the commit before; that commit's process writes it."""
        path = self.adapters / f"{name}.safetensors"
        if not path.exists():
            self.library.save_adapter(model, path)
        return path


def import_from(source: Path) -> Any:
    """The package sparsifiner in a folder, whatever is installed.

    Raises:
        RuntimeError: Python takes another one.
    """
    sys.meta_path[:] = [
        finder for finder in sys.meta_path if not type(finder).__module__.startswith("_editable")
    ]
    sys.path.insert(0, str(source))
    library = importlib.import_module("sparsifiner")
    if not Path(library.__file__ or "").is_relative_to(source):
        raise RuntimeError(f"sparsifiner came from {library.__file__}, not from {source}; uninstall it")
    importlib.import_module("sparsifiner.models")  # registers LV-ViT
    return library


def main() -> None:
    """Runs everything on one thread."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, help="folder that holds the package sparsifiner")
    parser.add_argument("output", type=Path, help="safetensors file of the results")
    parser.add_argument("adapters", type=Path, help="folder of adapters")
    parser.add_argument("--shared", type=Path, help="folder with trained runs in checkpoints/runs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # untrained scorers, old spellings
    probe = Probe(import_from(options.source.resolve()), options.adapters)
    for name, (_, arguments) in MODELS.items():
        images = make_images(arguments["img_size"])
        probe.add_settings(name, images)
        probe.add_calibrated(name, images)
    if options.shared is not None:
        probe.add_trained(options.shared)
    save_file(probe.tensors, options.output, {"refusals": json.dumps(probe.refusals)})


if __name__ == "__main__":
    main()
