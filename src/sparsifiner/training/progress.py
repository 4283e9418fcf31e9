"""How far a run is, and with what: what a checkpoint holds besides weights and optimizer."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from sparsifiner.config import config_from_dict, config_to_dict
from sparsifiner.convert import sparse_layers
from sparsifiner.data import ImageSet

_FILE = "progress.pt"
_SHOWN = 5
# what names of the configuration begin with in a subject
_SPARSITY = "sparsity."


def describe_subject(model: nn.Module, images: ImageSet, validation: ImageSet) -> dict[str, Any]:
    """What a run trains, and on what, as plain values: it must be the same when the run resumes."""
    subject: dict[str, Any] = {
        "model": type(model).__name__,
        "images": images.describe(),
        "validation_images": validation.describe(),
    }
    for layer in sparse_layers(model, required=False)[:1]:  # all layers have one configuration
        subject |= {f"{_SPARSITY}{name}": value for name, value in config_to_dict(layer.config).items()}
    return subject | {name: list(tensor.shape) for name, tensor in model.state_dict().items()}


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What differs, as "name: before -> after"."""
    return [
        f"{name}: {before.get(name)!r} -> {after.get(name)!r}"
        for name in dict.fromkeys([*before, *after])
        if before.get(name) != after.get(name)
    ]


@dataclass
class Progress:
    """What a checkpoint holds besides weights and optimizer.

    Attributes:
        steps_before: optimizer steps of the stages before this one.
        best: best top-1 so far in percent.
        sums: sums of the losses since the last log line.
        summed: number of their steps.
        ema: moving average of the weights.
        teacher: digest of the teacher's weights, which a checkpoint does not hold.
        subject: what is trained, and on what, as `describe_subject` tells.
    """

    steps_before: int = 0
    best: float = -1.0
    sums: dict[str, Tensor] = field(default_factory=dict)
    summed: int = 0
    ema: ModelEmaV3 | None = None
    teacher: str = ""
    subject: dict[str, Any] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Writes it into a checkpoint."""
        ema = {} if self.ema is None else self.ema.module.state_dict()
        torch.save({**vars(self), "ema": ema}, folder / _FILE)

    def load(self, folder: Path) -> None:
        """Reads it from a checkpoint, without running code that may be in there.

        Raises:
            ValueError: the run has another teacher now, or the checkpoint is of an older version.
        """
        state = _read(folder)
        if state["teacher"] != self.teacher:
            raise ValueError(
                "the teacher's weights are not those that the run began with; give the same weights, or "
                "another --output"
            )
        self.steps_before, self.best, self.summed = state["steps_before"], state["best"], state["summed"]
        self.sums = dict(state["sums"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])


def check_subject(folder: Path, subject: dict[str, Any]) -> None:
    """Refuses to go on from a checkpoint with another model or other images.

    Raises:
        ValueError: they differ, or the checkpoint is of an older version.
    """
    changed = differences(_as_told_now(_read(folder)["subject"]), subject)
    if changed:
        more = f"; and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
        raise ValueError(
            f"{folder} was made with another model or other images: {'; '.join(changed[:_SHOWN])}{more}. "
            "Resume with what the run began with, or give another --output"
        )


def _as_told_now(subject: dict[str, Any]) -> dict[str, Any]:
    """A subject with the configuration as it is described now, whatever release described it."""
    told = {
        name.removeprefix(_SPARSITY): value for name, value in subject.items() if name.startswith(_SPARSITY)
    }
    if not told:
        return subject
    try:
        config = config_to_dict(config_from_dict(told))
    except (TypeError, ValueError):  # then it differs, as it stands there
        return subject
    rest = {name: value for name, value in subject.items() if not name.startswith(_SPARSITY)}
    return rest | {f"{_SPARSITY}{name}": value for name, value in config.items()}


def _read(folder: Path) -> dict[str, Any]:
    file = folder / _FILE
    state = torch.load(file, map_location="cpu", weights_only=True) if file.exists() else {}
    if "subject" not in state:
        raise ValueError(
            f"{folder} does not tell in {_FILE} what it was made with, an older version wrote it; give "
            "another --output"
        )
    return dict(state)
