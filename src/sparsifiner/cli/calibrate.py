"""The command that calibrates a model without labels."""

import json as json_format
import sys
import time
from pathlib import Path
from typing import Literal

from sparsifiner.cli.options import ModelOptions, SparsityOptions, WeightOptions
from sparsifiner.data import evaluation_transform, make_loader, open_images
from sparsifiner.device import choose_device
from sparsifiner.models.adapter import check_new, save_adapter
from sparsifiner.models.loading import load_model
from sparsifiner.training.calibration import Calibration
from sparsifiner.training.calibration import calibrate as calibrate_model
from sparsifiner.viz.calibration import write_calibration

_BAR = 40


def calibrate(
    model: ModelOptions,
    weights: WeightOptions,
    sparsity: SparsityOptions,
    *,
    data: str = "digits",
    split: str = "train",
    limit: int = 128,
    batch_size: int = 32,
    workers: int = 2,
    match: Literal["logits", "tokens"] = "logits",
    output: Path = Path("runs/calibrated.safetensors"),
    device: str = "auto",
    mean: list[float] | None = None,
    std: list[float] | None = None,
    crop_pct: float | None = None,
    interpolation: str | None = None,
    json: bool = False,
) -> None:
    """Spreads the keys over the layers so that the sparse model comes nearest to the dense one; no labels.

    Args:
        model: the model.
        weights: its weights; they are not changed.
        sparsity: how sparse; `keep` is the mean over the layers, which stays.
        data: images, as for `eval`; their labels are not used.
        split: part of the data to read.
        limit: number of images, spread evenly over the split.
        batch_size: images per batch.
        workers: processes that read images, 0 for none.
        match: what should be as in the dense model: "logits", or "tokens" for detection and segmentation.
        output: adapter file to write, with an .svg beside it; `eval --adapter` and
            `sparsifiner.load_adapter(model, path)` read it.
        device: where to compute, such as "cuda" or "cpu"; "auto" takes a GPU if there is one.
        mean: channel means for normalisation, the model's own by default.
        std: channel standard deviations, the model's own by default.
        crop_pct: share of the image side that the centre crop keeps, the model's own by default.
        interpolation: resizing filter, the model's own by default.
        json: print JSON.
    """
    config = sparsity.to_config(weights.adapter)
    if config is None:
        raise ValueError("preset='dense' has no keys to spread; use preset='fast' or 'paper'")
    check_new(output)
    chosen = choose_device(device)
    images = open_images(data, split, limit=limit)
    arguments = dict(model.model_args or {})
    if weights.weights is None and not weights.pretrained:
        print("no --weights and no --pretrained: the model's weights are random", file=sys.stderr)
    if not weights.pretrained:
        arguments.setdefault("num_classes", images.num_classes)
    built = load_model(
        model.model,
        config=config,
        weights=weights.weights,
        adapter=weights.adapter,
        img_size=model.img_size,
        pretrained=weights.pretrained,
        model_args=arguments,
    ).to(chosen)
    transform = evaluation_transform(
        built, mean=mean, std=std, crop_pct=crop_pct, interpolation=interpolation
    )
    loader = make_loader(images, transform, batch_size, workers=workers)
    start = time.perf_counter()
    report = calibrate_model(built, (batch for batch, _ in loader), match=match, device=chosen)
    seconds = time.perf_counter() - start
    save_adapter(built, output)
    write_calibration(output.with_suffix(".svg"), report)
    if json:
        print(json_format.dumps({**report.to_dict(), "seconds": seconds, "output": str(output)}))
    else:
        _print_report(report, seconds, output)


def _print_report(report: Calibration, seconds: float, output: Path) -> None:
    unit = "KL to the dense logits" if report.match == "logits" else "relative distance of the patch tokens"
    print(f"layer   keys before   keys now   ({sum(report.budgets)} of {sum(report.budgets_before)} in all)")
    longest = max(*report.budgets, *report.budgets_before)
    for layer, (before, now) in enumerate(zip(report.budgets_before, report.budgets, strict=True)):
        print(f"{layer:5}{before:14}{now:11}   {'#' * round(_BAR * now / longest)}")
    print(f"{unit}: {report.error_before:.4f} before, {report.error:.4f} now, on {report.images} images")
    if report.budgets == report.budgets_before:
        print("nothing better was found; give more images with --limit, or another --keep")
    print(f"{output} was written in {seconds:.0f} s")
