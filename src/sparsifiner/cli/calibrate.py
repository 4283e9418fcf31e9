"""The command that calibrates a model without labels."""

import json as json_format
import time
from pathlib import Path
from typing import Literal

from sparsifiner.calibration.budgets import Calibration
from sparsifiner.calibration.budgets import calibrate as calibrate_model
from sparsifiner.calibration.picture import write_calibration
from sparsifiner.cli.options import ImageOptions, ModelOptions, SparsityOptions, WeightOptions, build_model
from sparsifiner.convert import about_to_train
from sparsifiner.data import make_loader, open_images
from sparsifiner.device import choose_device
from sparsifiner.files import check_absent
from sparsifiner.models.adapter import check_new, save_adapter

_BAR = 40


def calibrate(
    model: ModelOptions,
    weights: WeightOptions,
    sparsity: SparsityOptions,
    preparation: ImageOptions,
    *,
    data: str = "digits",
    split: str = "train",
    limit: int = 128,
    batch_size: int = 32,
    workers: int = 2,
    match: Literal["logits", "tokens"] = "logits",
    fit_steps: int = 300,
    output: Path = Path("runs/calibrated.safetensors"),
    device: str = "auto",
    json: bool = False,
) -> None:
    """Fits scorers and spreads keys over the layers to come nearest to the dense model; needs no labels.

    Args:
        model: the model.
        weights: its weights; they are not changed.
        sparsity: how sparse; `keep` is the mean over the layers, which stays.
        preparation: how images are prepared.
        data: images, as for `eval`; their labels are not used.
        split: part of the data to read.
        limit: number of images, spread evenly over the split.
        batch_size: images per batch.
        workers: processes that read images, 0 for none.
        match: what should be as in the dense model: "logits", or "tokens" for detection and segmentation.
        fit_steps: steps, of a batch each, in which scorers with weights learn; 0 for none.
        output: adapter file to write, with an .svg beside it; `eval --adapter` and
            `sparsifiner.load_adapter(model, path)` read it.
        device: where to compute, such as "cuda" or "cpu"; "auto" takes a GPU if there is one.
        json: print JSON.
    """
    config = sparsity.to_config(weights.adapter)
    if config is None:
        raise ValueError("preset='dense' has no keys to spread; use preset='fast' or 'paper'")
    figure = check_new(output).with_suffix(".svg")
    check_absent(figure)
    chosen = choose_device(device)
    images = open_images(data, split, limit=limit)
    with about_to_train(scorer=fit_steps > 0):
        built = build_model(model, weights, config, images.num_classes).to(chosen)
    loader = make_loader(images, preparation.transform(built), batch_size, workers=workers)
    start = time.perf_counter()
    report = calibrate_model(
        built, (batch for batch, _ in loader), match=match, fit_steps=fit_steps, device=chosen
    )
    seconds = time.perf_counter() - start
    save_adapter(built, output)
    write_calibration(figure, report.to_dict())
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
