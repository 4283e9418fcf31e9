"""How far a run is: what a checkpoint holds besides weights and optimizer."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from timm.utils import ModelEmaV3
from torch import Tensor

_FILE = "progress.pt"


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
    """

    steps_before: int = 0
    best: float = -1.0
    sums: dict[str, Tensor] = field(default_factory=dict)
    summed: int = 0
    ema: ModelEmaV3 | None = None
    teacher: str = ""

    def save(self, folder: Path) -> None:
        """Writes it into a checkpoint."""
        ema = {} if self.ema is None else self.ema.module.state_dict()
        torch.save({**vars(self), "ema": ema}, folder / _FILE)

    def load(self, folder: Path) -> None:
        """Reads it from a checkpoint, without running code that may be in there.

        Raises:
            ValueError: the run has another teacher now, or the checkpoint is of an older version.
        """
        if not (folder / _FILE).exists():
            raise ValueError(f"{folder} holds no {_FILE}, an older version wrote it; give another --output")
        state = torch.load(folder / _FILE, map_location="cpu", weights_only=True)
        if state["teacher"] != self.teacher:
            raise ValueError(
                "the teacher's weights are not those that the run began with; give the same weights, or "
                "another --output"
            )
        self.steps_before, self.best, self.summed = state["steps_before"], state["best"], state["summed"]
        self.sums = dict(state["sums"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
