"""The folder of a run: settings, measurements, checkpoints and weights; nothing there is overwritten."""

import json
import logging
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from sparsifiner.files import write_aside
from sparsifiner.training.progress import check_subject, differences

_logger = logging.getLogger(__name__)

SETTINGS = "config.yaml"
METRICS = "metrics.jsonl"
_CHECKPOINTS = "checkpoints"
# they decide where and how fast a run computes, not what
_MACHINE_SETTINGS = ("workers", "accumulate", "output", "device", "checkpoint_every")
# what a run leaves, by which one is known
_TRACES = (METRICS, _CHECKPOINTS, "report.html", "best.safetensors", "last.safetensors")


@dataclass(frozen=True, order=True)
class Position:
    """How far a run is.

    Attributes:
        stage: index of the stage.
        step: optimizer steps done in it.
    """

    stage: int = 0
    step: int = 0


class RunFolder:
    """The files of one run.

    Args:
        path: the folder.
        writes: whether this is the main process; the others only read.
    """

    def __init__(self, path: Path, *, writes: bool) -> None:
        self.path = path
        self.writes = writes
        self.board: SummaryWriter | None = None
        self.checkpoint = self._latest_checkpoint()

    @staticmethod
    def begin(path: Path, settings: dict[str, Any], subject: dict[str, Any], *, resume: bool) -> None:
        """Makes the folder ready: for a new run, or to go on from its newest checkpoint. Main process only.

        Args:
            path: the folder; made if it is missing.
            settings: everything that decides the result, as plain values.
            subject: what is trained, and on what, as `describe_subject` tells.
            resume: continue the run that is there; one without a checkpoint begins anew.

        Raises:
            FileExistsError: files of a run are there and `resume` was not asked for.
            ValueError: the run that is there has other settings or another subject, or they are lost.
        """
        folder = RunFolder(path, writes=True)
        there = [name for name in _TRACES if (path / name).exists()]
        if there and not resume:
            raise FileExistsError(
                f"output={str(path)!r} holds a run already ({', '.join(there)}); continue it with --resume, "
                "or give another --output"
            )
        if there and not (path / SETTINGS).exists():
            raise ValueError(
                f"output={str(path)!r} holds {', '.join(there)} but no {SETTINGS}; put it back, or give "
                "another --output"
            )
        if folder.checkpoint is not None:
            folder.check_settings(settings)
            check_subject(folder.checkpoint, subject)
        elif resume:
            _logger.warning("sparsifiner: %s holds no checkpoint to resume; the run begins anew", path)
        path.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(settings, sort_keys=False)
        write_aside(path / SETTINGS, lambda file: file.write_text(text))
        folder.forget_after(folder.position)

    @property
    def position(self) -> Position:
        """Where the newest checkpoint stands."""
        return Position() if self.checkpoint is None else _position_of(self.checkpoint)

    def log(self, record: dict[str, Any], *, at: int) -> None:
        """Appends a record to the measurements; numbers also go to TensorBoard.

        Args:
            record: plain values; "stage" and "kind" name the curves.
            at: optimizer steps since the run began.
        """
        if not self.writes:
            return
        with (self.path / METRICS).open("a") as file:
            file.write(json.dumps(record) + "\n")
        if self.board is None:
            self.board = SummaryWriter(str(self.path / "tensorboard"), purge_step=at)
        for name, value in record.items():
            if isinstance(value, float) and math.isfinite(value):
                self.board.add_scalar(f"{record['kind']}/{name}", value, at)
        self.board.flush()

    def records(self) -> list[dict[str, Any]]:
        """All measurements so far."""
        file = self.path / METRICS
        if not file.exists():
            return []
        return [json.loads(line) for line in file.read_text().splitlines()]

    def save_checkpoint(
        self, position: Position, save: Callable[[Path], None], wait: Callable[[], None]
    ) -> None:
        """Saves a checkpoint aside, renames it, and removes older ones; all processes call this.

        Args:
            position: where the run stands.
            save: writes the state into a folder.
            wait: waits for all processes.
        """
        folder = self.path / _CHECKPOINTS
        aside = folder / "unfinished"
        if self.writes:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        wait()
        save(aside)
        wait()
        final = folder / f"{position.stage:02d}-{position.step:08d}"
        if self.writes and not final.exists():
            aside.rename(final)
            for older in folder.iterdir():
                if older != final:
                    shutil.rmtree(older)
        self.checkpoint = final
        wait()

    def save_weights(self, name: str, weights: dict[str, Tensor]) -> None:
        """Writes a safetensors file, aside and renamed."""
        if self.writes:
            tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in weights.items()}
            write_aside(self.path / f"{name}.safetensors", lambda file: save_file(tensors, file))

    def close(self) -> None:
        """Closes what is open."""
        if self.board is not None:
            self.board.close()

    def check_settings(self, settings: dict[str, Any]) -> None:
        """Refuses to go on with other settings than those that the run began with.

        Raises:
            ValueError: they differ, or are lost.
        """
        if not (self.path / SETTINGS).exists():
            raise ValueError(
                f"output={str(self.path)!r} holds checkpoints but no {SETTINGS}; put it back, or give "
                "another --output"
            )
        texts = (self.path / SETTINGS).read_text(), yaml.safe_dump(settings)
        before, after = (
            {name: value for name, value in yaml.safe_load(text).items() if name not in _MACHINE_SETTINGS}
            for text in texts
        )
        changed = differences(before, after)
        if changed:
            raise ValueError(
                f"output={str(self.path)!r} was begun with other settings: {'; '.join(changed)}. "
                f"Resume with --config {self.path / SETTINGS}, or give another --output"
            )

    def _latest_checkpoint(self) -> Path | None:
        finished = sorted((self.path / _CHECKPOINTS).glob("[0-9]*-[0-9]*"))
        return finished[-1] if finished else None

    def forget_after(self, position: Position) -> None:
        """Drops measurements behind the checkpoint: they are made again, and equal."""
        file = self.path / METRICS
        if not file.exists():
            return
        kept = []
        for line in file.read_text().splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:  # the run was killed while it wrote the last line
                break
            if Position(record["stage_index"], record["step"]) <= position:
                kept.append(line + "\n")
        write_aside(file, lambda aside: aside.write_text("".join(kept)))


def _position_of(checkpoint: Path) -> Position:
    stage, _, step = checkpoint.name.partition("-")
    return Position(int(stage), int(step))
