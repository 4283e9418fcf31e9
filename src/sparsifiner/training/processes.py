"""What it takes for many processes to train as one."""

import pickle
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast, broadcast_object_list
from torch import Tensor, nn

from sparsifiner.training.recipe import Recipe
from sparsifiner.training.run import RunFolder


def begin_together(
    accelerator: Accelerator,
    output: Path,
    settings: dict[str, Any],
    subject: dict[str, Any],
    *,
    resume: bool,
) -> RunFolder:
    """Has the main process lock the folder and make it ready; all processes go on, or fail, together.

    The checkpoint that the main process chose is the one that all load.

    Raises:
        BlockingIOError, FileExistsError, OSError, ValueError: see `RunFolder.begin`.
        UnpicklingError: the checkpoint there holds more than values.
    """
    run: RunFolder | None = None
    told: list[Any] = [None, None, None]  # an error, or the name of the run and its checkpoint
    if accelerator.is_main_process:
        try:
            run = RunFolder.begin(output, settings, subject, resume=resume)
            told = [None, run.name, run.checkpoint]
        except (OSError, ValueError, pickle.UnpicklingError) as error:
            told = [error, None, None]
    broadcast_object_list(told)
    failed, name, checkpoint = told
    if failed is not None:
        raise failed
    return run or RunFolder(output, name, checkpoint)


def check_launch(accelerator: Accelerator, recipe: Recipe) -> None:
    """Refuses what a launcher's configuration may ask for and the loop does not do.

    Raises:
        ValueError: the kind of distribution, or the accumulation, is another.
    """
    kind = accelerator.distributed_type
    if kind not in {DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU}:
        raise ValueError(f"training runs on one process or data-parallel on many, not with {kind.value}")
    if accelerator.gradient_accumulation_steps != recipe.accumulate:
        raise ValueError(
            f"accumulate={recipe.accumulate}, but the launcher asks for "
            f"{accelerator.gradient_accumulation_steps} gradient accumulation steps; set accumulate alone"
        )


@torch.no_grad()
def share_weights(model: nn.Module) -> None:
    """Gives all processes the weights of the main one."""
    for tensor in model.state_dict().values():
        tensor.copy_(broadcast(tensor.clone()))


def name_weights_alike(accelerator: Accelerator) -> None:
    """Lets a checkpoint of one process resume on many: their wrapper adds a prefix to every name."""

    def save(models: list[nn.Module], weights: list[dict[str, Tensor]], folder: str) -> None:
        weights[:] = [
            {name.removeprefix("module."): tensor for name, tensor in state.items()} for state in weights
        ]

    def load(models: list[nn.Module], folder: str) -> None:
        models[:] = [accelerator.unwrap_model(model) for model in models]

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)
