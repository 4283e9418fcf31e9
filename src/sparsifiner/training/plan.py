"""What a run will do, said before it starts, and a rehearsal of it."""

import dataclasses
import tempfile
import time

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from PIL import Image
from torch import nn

from sparsifiner.convert import sparse_layers, why_not
from sparsifiner.data import ImageSet
from sparsifiner.hosts import host_of
from sparsifiner.macs import count_macs
from sparsifiner.models.adapter import is_scorer
from sparsifiner.scorers import SCORERS
from sparsifiner.training.data import Share
from sparsifiner.training.loop import train
from sparsifiner.training.recipe import Recipe, Stage
from sparsifiner.training.stages import why_skipped

_STEPS = 2


def describe_plan(
    model: nn.Module,
    recipe: Recipe,
    images: ImageSet | None,
    validation: ImageSet | None,
    processes: int = 1,
) -> str:
    """The plan of a run as text.

    Args:
        model: what is trained.
        recipe: how.
        images: to train on; None if they are not here.
        validation: to validate on; None if they are not here.
        processes: number of processes.

    Raises:
        ValueError: the model is none that can be trained, or the batch cannot be divided.
    """
    reasons = why_not(model)
    if reasons:
        raise ValueError(f"model cannot be trained: {'; '.join(reasons)}")
    share = Share(0, processes, recipe.accumulate)
    share.check(recipe.batch_size)
    height, width = host_of(model).image_size
    macs = count_macs(model, (3, height, width)).to_dict()
    dense, sparse = macs["dense"]["attention"] / 1e6, macs["sparse"]["attention"] / 1e6
    parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    lines = [
        f"model     {type(model).__name__}, {height}x{width} px, {macs['tokens']} tokens, "
        f"{parameters:.2f} M parameters",
        f"attention {_describe_attention(model)}: {sparse:.1f} MMACs per image (dense {dense:.1f}), "
        f"scorer {macs['sparse'].get('scorer', 0) / 1e6:.1f}",
        f"batch     {recipe.batch_size} images = {processes} processes x {recipe.accumulate} parts x "
        f"{recipe.batch_size // share.parts} images, {'fp32' if recipe.amp == 'none' else recipe.amp}",
    ]
    if images is None or validation is None:
        lines.append("data      is not here: the number of steps is unknown")
    else:
        lines.append(
            f"data      {len(images)} images to train on, {len(validation)} to validate on, "
            f"{images.num_classes} classes"
        )
    for index, stage in enumerate(recipe.stages):
        steps = None if images is None else len(images) // recipe.batch_size
        lines.append(f"stage {index + 1}   {_describe_stage(model, recipe, stage, steps)}")
    return "\n".join(lines)


def rehearse(
    model: nn.Module, recipe: Recipe, *, teacher: nn.Module | None = None, device: str = "auto"
) -> float:
    """Takes two steps per stage on random images, with all that belongs to a run, in a folder that goes.

    Args:
        model: what is trained; its weights change.
        recipe: how; epochs are cut short, and on a CPU batches too.
        teacher: as for `train`.
        device: as for `train`.

    Returns:
        Seconds that it took.
    """
    host = host_of(model)
    start = time.perf_counter()
    parts = PartialState(cpu=device == "cpu").num_processes * recipe.accumulate
    stages = [dataclasses.replace(stage, epochs=1, warmup_epochs=0) for stage in recipe.stages]
    # on a GPU the batch is what may not fit
    batch = recipe.batch_size if torch.cuda.is_available() and device != "cpu" else 2 * parts
    short = dataclasses.replace(recipe, stages=stages, batch_size=batch, workers=0)
    height, width = host.image_size
    draw = np.random.default_rng(recipe.seed)
    rows = [
        (Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8)), row % host.num_classes)
        for row in range(2 * parts)
    ]
    rows *= -(-_STEPS * batch // len(rows))
    rows = rows[: _STEPS * batch]
    images = ImageSet(rows, [str(label) for label in range(host.num_classes)], "random images")
    with tempfile.TemporaryDirectory() as own:
        folder = [own]
        broadcast_object_list(folder)  # one for all processes
        train(model, images, images, short, folder[0], teacher=teacher, device=device)
    return time.perf_counter() - start


def _describe_attention(model: nn.Module) -> str:
    layers = sparse_layers(model, required=False)
    if not layers:
        return "dense"
    config = layers[0].config
    summary = "no summaries" if config.summary is None else f"summaries {config.summary}"
    return f"{SCORERS.name_of(config.scorer)} scorer, keep {config.keep}, tile {config.tile}, {summary}"


def _describe_stage(model: nn.Module, recipe: Recipe, stage: Stage, steps: int | None) -> str:
    reason = why_skipped(model, stage.kind)
    if reason is not None:
        return f"{stage.name}: skipped, {reason}"
    trains = stage.kind.trains
    learns = sum(
        parameter.numel() / 1e6
        for name, parameter in model.named_parameters()
        if trains == "everything" or is_scorer(name) == (trains == "scorer")
    )
    losses = " + ".join(f"{getattr(recipe.loss_weights, name):g} {name}" for name in stage.kind.losses)
    return (
        f"{stage.name}: {stage.epochs} epochs ({stage.warmup_epochs:g} of warm-up) x "
        f"{'?' if steps is None else steps} steps, lr {stage.peak_lr:g} -> {stage.last_lr:g}, "
        f"trains {learns:.2f} M parameters, loss {losses}"
    )
