"""The commands: each is one function, its help is the function's docstring."""

import copy
import dataclasses
import json as json_format
import sys
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState

from sparsifiner.cli.options import (
    DataOptions,
    ImageOptions,
    ModelOptions,
    SparsityOptions,
    WeightOptions,
    build_model,
    load_chosen,
)
from sparsifiner.config import config_to_dict
from sparsifiner.convert import about_to_train, desparsify, why_not
from sparsifiner.data import ImageSet, make_loader, open_images
from sparsifiner.demo import run_demo
from sparsifiner.device import choose_device
from sparsifiner.hosts import host_of
from sparsifiner.macs import count_macs
from sparsifiner.measure.accuracy import Accuracy
from sparsifiner.measure.accuracy import evaluate as evaluate_accuracy
from sparsifiner.measure.machine import describe_machine
from sparsifiner.measure.recall import mask_recall as measure_recall
from sparsifiner.models.loading import load_model, load_weights
from sparsifiner.training import Recipe, describe_plan, rehearse
from sparsifiner.training import train as train_model
from sparsifiner.training.data import seed_generators
from sparsifiner.training.stages import needs_teacher


def macs(model: ModelOptions, sparsity: SparsityOptions, *, json: bool = False) -> None:
    """Counts multiply-accumulates per image: dense, sparse, and by the paper's accounting.

    Args:
        model: the model.
        sparsity: how sparse.
        json: print JSON.
    """
    config = sparsity.to_config()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an untrained scorer costs what a trained one costs
        built = load_model(model.model, config=config, img_size=model.img_size, model_args=model.model_args)
    reasons = why_not(built)
    if reasons:
        raise ValueError(f"model={model.model!r} cannot be counted: {'; '.join(reasons)}")
    height, width = host_of(built).image_size
    report = count_macs(built, (3, height, width)).to_dict()
    if json:
        print(json_format.dumps(report))
        return
    print(f"{model.model}, {height}x{width} px, {report['tokens']} tokens; MMACs per image")
    print(f"{'':18}{'dense':>12}{'sparse':>12}")
    for name in report["sparse"]:
        dense = report["dense"].get(name, 0) / 1e6
        print(f"{name.replace('_', ' '):18}{dense:12.1f}{report['sparse'][name] / 1e6:12.1f}")
    print(f"{'key visits':18}{'100.0 %':>12}{100 * report['key_visits']:10.1f} %")
    if report["paper"] is not None:
        print(f"{'paper accounting':18}{'':12}{report['paper']['mhsa'] / 1e6:12.1f}  (attention + scorer)")


def evaluate(
    model: ModelOptions,
    weights: WeightOptions,
    sparsity: SparsityOptions,
    preparation: ImageOptions,
    *,
    data: str = "digits",
    split: str = "validation",
    batch_size: int = 64,
    workers: int = 2,
    device: str = "auto",
    amp: Literal["none", "bf16", "fp16"] = "none",
    limit: int | None = None,
    against_dense: bool = False,
    dense_weights: str | None = None,
    mask_recall: bool = False,
    json: bool = False,
) -> None:
    """Evaluates a model on labelled images: top-1, top-5, images/s; optionally beside its dense twin.

    Args:
        model: the model.
        weights: its weights.
        sparsity: how sparse.
        preparation: how images are prepared.
        data: "digits" (embedded), a folder of class folders, a folder of Parquet files, tar shards, or
            the name of a data set on the hub.
        split: part of the data to read.
        batch_size: images per batch.
        workers: processes that read images, 0 for none.
        device: where to compute, such as "cuda" or "cpu"; "auto" takes a GPU if there is one.
        amp: autocast precision.
        limit: number of images, all by default.
        against_dense: evaluate the dense twin on the same images: difference with its paired 95 %
            interval, agreement, KL of the logits.
        dense_weights: file of weights of that twin, by default the model's own.
        mask_recall: measure how much of each layer's dense attention its key lists keep.
        json: print JSON.
    """
    config = sparsity.to_config(weights.adapter)
    if mask_recall and config is None:
        raise ValueError(
            "mask_recall=True, but preset='dense' has no key lists; use preset='fast' or 'paper', or leave "
            "--mask-recall out"
        )
    chosen = choose_device(device)
    images = open_images(data, split, limit=limit)
    built = build_model(model, weights, config, images.num_classes)
    images.check_classes(built)
    built.to(chosen)
    dense = desparsify(copy.deepcopy(built)) if against_dense or dense_weights else None
    if dense is not None and dense_weights is not None:
        load_weights(dense, dense_weights, resample=weights.resample)
    batches = make_loader(images, preparation.transform(built), batch_size, workers=workers)
    accuracy = evaluate_accuracy(
        built,
        batches,
        dense=dense,
        device=chosen,
        amp_dtype={"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp],
    )
    recall = measure_recall(built, batches, device=chosen) if mask_recall else None
    if json:
        run = {"model": model.model, "data": data, "split": split, "device": str(chosen), "amp": amp}
        sparse = None if config is None else config_to_dict(config)
        print(json_format.dumps({**run, "sparsity": sparse, **accuracy.to_dict(), "mask_recall": recall}))
    else:
        _print_accuracy(accuracy)
        if recall:
            layers = " ".join(f"{share:.3f}" for share in recall)
            print(f"mask recall   {sum(recall) / len(recall):.3f} (layers: {layers})")


def train(
    model: ModelOptions,
    weights: WeightOptions,
    sparsity: SparsityOptions,
    data: DataOptions,
    recipe: Recipe,
    *,
    output: Path = Path("runs/train"),
    teacher_weights: str | None = None,
    device: Literal["auto", "cpu"] = "auto",
    resume: bool = False,
    dry_run: bool = False,
) -> None:
    """Trains a sparse or dense model, by default in the paper's two stages; one process or many.

    Args:
        model: the model.
        weights: what it starts from.
        sparsity: how sparse.
        data: the images.
        recipe: how to train.
        output: folder of the run: settings, measurements, report, weights, checkpoint.
        teacher_weights: file of weights of the dense twin that teaches, by default those the model starts
            from.
        device: where to compute: "auto" takes a GPU if there is one.
        resume: continue the run in output.
        dry_run: build everything, print the plan, take two steps per stage on random images, keep nothing.
    """
    config = sparsity.to_config(weights.adapter)
    images: ImageSet | None = None
    validation: ImageSet | None = None
    try:
        images, validation = data.open()
    except FileNotFoundError:
        if not dry_run:
            raise
    num_classes = None if images is None else images.num_classes
    seed_generators(recipe.seed)
    teacher = None
    with about_to_train():
        built = load_chosen(model, weights, config, num_classes)
    if teacher_weights is not None:
        own = WeightOptions(weights=teacher_weights, resample=weights.resample)
        teacher = load_chosen(model, own, None, num_classes)
    processes = PartialState(cpu=device == "cpu")
    plan = describe_plan(built, recipe, images, validation, processes.num_processes)
    if processes.is_main_process:
        random_start = _random_start(weights, built)
        if random_start is not None:
            taught = any(needs_teacher(stage.kind) for stage in recipe.stages) and teacher is None
            note = ", and so does its teacher; train it with the stage classify first" if taught else ""
            print(f"{random_start}: training starts from random weights{note}", file=sys.stderr)
        print(plan)
    if dry_run:
        seconds = rehearse(built, recipe, teacher=teacher, device=device)
        if processes.is_main_process:
            print(f"dry run: two steps per stage on random images took {seconds:.0f} s; nothing was kept")
        return
    assert images is not None
    assert validation is not None
    settings: dict[str, Any] = {"teacher_weights": teacher_weights, "output": str(output), "device": device}
    for options in (model, weights, sparsity, data):
        settings |= dataclasses.asdict(options)
    result = train_model(
        built,
        images,
        validation,
        recipe,
        output,
        teacher=teacher,
        settings=settings,
        device=device,
        resume=resume,
    )
    if processes.is_main_process:
        validations = [record for record in result.records if record["kind"] == "validation"]
        if validations:  # no line of metrics.jsonl that tells of one may be readable any more
            best = max(validations, key=lambda record: max(record["top1"], record.get("top1_ema", 0)))
            print(
                f"best top-1 {max(best['top1'], best.get('top1_ema', 0)):.2f} % after {best['stage']} epoch "
                f"{best['epoch']:g}; last {validations[-1]['top1']:.2f} %"
            )
        print(f"weights, measurements and report.html are in {result.output}")


def _random_start(weights: WeightOptions, model: torch.nn.Module) -> str | None:
    """Why some weights are random before training, None if none is."""
    if weights.weights is not None:
        return None
    if not weights.pretrained:
        return "no --weights and no --pretrained"
    expected = getattr(model, "pretrained_cfg", {}).get("num_classes")
    actual = getattr(model, "num_classes", None)
    return None if expected == actual else f"the pretrained head has {expected} classes and not {actual}"


def _print_accuracy(accuracy: Accuracy) -> None:
    print(f"images        {accuracy.images}")
    print(f"top-1         {accuracy.top1:.2f} %")
    print(f"top-5         {accuracy.top5:.2f} %")
    print(f"images/s      {accuracy.images_per_second:.1f} (forward passes)")
    against = accuracy.against_dense
    if against is not None:
        print(f"dense top-1   {against.dense_top1:.2f} %")
        print(f"difference    {against.difference:+.2f} ± {against.interval:.2f} points (paired, 95 %)")
        print(f"agreement     {against.agreement:.2f} %")
        print(f"logit KL      {against.logit_kl:.4f} nats")
        if against.token_cosine is not None:
            cosine, distance = against.token_cosine, against.token_error
            print(f"patch tokens  cosine {cosine:.4f}, relative distance {distance:.3f}")
        print(f"dense img/s   {against.dense_images_per_second:.1f}")


def info(*, json: bool = False) -> None:
    """Tells versions, devices and which backends run here, or why not and what to do about it.

    Args:
        json: print JSON.
    """
    machine = describe_machine()
    if json:
        print(json_format.dumps(machine))
        return
    rows = {name: version or "not installed" for name, version in machine["versions"].items()}
    rows["CPU"] = f"{machine['cpu']['name']}, {machine['cpu']['threads']} threads"
    rows["GPUs"] = ", ".join(machine["gpus"]) or "none"
    rows["instructions"] = machine["isa"]
    for name, row in rows.items():
        print(f"{name:14}{row}")
    print("\nbackend       runs here")
    for name, backend in machine["backends"].items():
        print(f"{name:14}{'yes' if backend['runs'] else 'no':5}{backend['brings']}")
        if not backend["runs"]:
            print(f"{'':19}{backend['reason']}")


def demo(output: Path = Path("runs/demo"), seed: int = 0) -> None:
    """Trains a small ViT on handwritten digits, makes it sparse with and without training, shows the cost.

    Args:
        output: folder for report.html and the training runs; an older one is kept under another name.
        seed: seed of the training.
    """
    run_demo(output, seed)
