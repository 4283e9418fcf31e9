"""The folder of a run: settings, measurements, checkpoints and weights; nothing there is overwritten."""

import json
import logging
import math
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import yaml
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from sparsifiner.config import scorer_of
from sparsifiner.files import sync, write_aside
from sparsifiner.old_spellings import modern_settings
from sparsifiner.training.checkpoints import Checkpoints, Position, named_checkpoints
from sparsifiner.training.lock import FolderLock
from sparsifiner.training.metrics import forget_after, read_records
from sparsifiner.training.progress import check_subject, differences
from sparsifiner.training.seal import mark_of

_logger = logging.getLogger(__name__)

SETTINGS = "config.yaml"
METRICS = "metrics.jsonl"
_CHECKPOINTS = "checkpoints"
# names the run, as its checkpoints do
_NAME = ".run"
# they decide where and how fast a run computes, not what
_MACHINE_SETTINGS = ("workers", "accumulate", "output", "device", "checkpoint_every")
# files that a run leaves, by which one is known, besides checkpoints
_TRACES = (METRICS, "report.html", "best.safetensors", "last.safetensors")


class RunFolder:
    """The files of one run.

    Args:
        path: the folder.
        name: of the run, in its checkpoints.
        checkpoint: that the run goes on from, None for its beginning.
        lock: of the folder, which the main process holds; the others only read.
    """

    def __init__(
        self, path: Path, name: str, checkpoint: Path | None, lock: FolderLock | None = None
    ) -> None:
        self.path = path
        self.name = name
        self.checkpoint = checkpoint
        self.lock = lock
        self.board: SummaryWriter | None = None
        self.checkpoints = Checkpoints(path / _CHECKPOINTS, name, checkpoint)

    @classmethod
    def begin(
        cls, path: Path, settings: dict[str, Any], subject: dict[str, Any], *, resume: bool
    ) -> "RunFolder":
        """Makes the folder ready: for a new run, or to go on from its newest intact checkpoint.

        The main process calls this, and then holds the folder's lock until it closes the run.

        Args:
            path: the folder; made if it is missing.
            settings: everything that decides the result, as plain values.
            subject: what is trained, and on what, as `describe_subject` tells.
            resume: continue the run that is there; one without a checkpoint begins anew.

        Raises:
            BlockingIOError: another process trains in this folder.
            FileExistsError: files of a run are there and `resume` was not asked for.
            OSError: the folder cannot be written.
            ValueError: the run that is there has other settings or another subject, or they are lost; none of
                its checkpoints is intact.
        """
        with ExitStack() as on_error:
            lock = FolderLock(path)
            on_error.callback(lock.release)
            _check_traces(path, resume=resume)
            name = (_name_of(path) if resume else None) or uuid4().hex
            folder = cls(path, name, Checkpoints(path / _CHECKPOINTS, name).choose(), lock)
            if folder.checkpoint is not None:
                folder.check_settings(settings)
                check_subject(folder.checkpoint, subject)
            elif resume:
                _logger.warning("sparsifiner: %s holds no checkpoint to resume; the run begins anew", path)
            text = yaml.safe_dump(settings, sort_keys=False)
            write_aside(path / SETTINGS, lambda file: file.write_text(text))
            write_aside(path / _NAME, lambda file: file.write_text(name))
            folder.checkpoints.sweep()
            forget_after(path / METRICS, folder.position)
            on_error.pop_all()
            return folder

    @property
    def position(self) -> Position:
        """Where the run goes on from."""
        return Position() if self.checkpoint is None else Position.of(self.checkpoint)

    @property
    def writes(self) -> bool:
        """Whether this is the main process."""
        return self.lock is not None

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
        """All measurements so far, without damaged lines."""
        return read_records(self.path / METRICS)

    def save_checkpoint(
        self, position: Position, save: Callable[[Path], None], wait: Callable[[], None]
    ) -> None:
        """Saves a checkpoint; all processes call this.

        Args:
            position: where the run stands.
            save: writes the state into a folder.
            wait: waits for all processes.
        """
        if self.writes and (self.path / METRICS).exists():
            sync(self.path / METRICS)  # a checkpoint must not outlive what was measured before it
        self.checkpoints.save(position, save, wait, writes=self.writes)

    def save_weights(self, name: str, weights: dict[str, Tensor]) -> None:
        """Writes a safetensors file, aside and renamed."""
        if self.writes:
            tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in weights.items()}
            write_aside(self.path / f"{name}.safetensors", lambda file: save_file(tensors, file))

    def close(self) -> None:
        """Closes what is open, and lets other processes in."""
        try:
            if self.board is not None:
                self.board.close()
        finally:
            if self.lock is not None:
                self.lock.release()

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
        before, after = (
            {name: value for name, value in each.items() if name not in _MACHINE_SETTINGS}
            for each in (_read_settings(self.path / SETTINGS), _as_written(settings))
        )
        changed = differences(before, after)
        if changed:
            raise ValueError(
                f"output={str(self.path)!r} was begun with other settings: {'; '.join(changed)}. "
                f"Resume with --config {self.path / SETTINGS}, or give another --output"
            )


def _check_traces(path: Path, *, resume: bool) -> None:
    """Refuses a folder that holds another run, or in which none can be continued.

    Raises:
        FileExistsError: see `RunFolder.begin`.
        ValueError: settings are lost, or checkpoints are out of reach.
    """
    checkpoints = path / _CHECKPOINTS
    if os.path.lexists(checkpoints) and not checkpoints.is_dir():
        raise ValueError(
            f"{checkpoints} is no folder, nor a link to one that is there; put that back, or give another "
            "--output"
        )
    there = [name for name in _TRACES if (path / name).exists()]
    there += [_CHECKPOINTS] * bool(named_checkpoints(checkpoints))
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


def _name_of(path: Path) -> str | None:
    """The name of the run in a folder, None where it has none yet.

    A copy may lack the hidden file that has it; its newest checkpoint tells it too.
    """
    try:
        return UUID((path / _NAME).read_text().strip()).hex
    except (OSError, ValueError):
        marks = map(mark_of, named_checkpoints(path / _CHECKPOINTS))
        return next((mark[0] for mark in marks if mark is not None), None)


def _as_written(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as a file gives them back, with the spellings of now."""
    values: dict[str, Any] = yaml.safe_load(yaml.safe_dump(settings))
    if "preset" not in values:  # not the command line's
        return values
    return modern_settings(values, scorer_of(str(values["preset"])))


def _read_settings(file: Path) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is damaged ({error}); put a copy back, or give another --output") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{file} holds no settings; put a copy back, or give another --output")
    try:
        return _as_written(settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file} is damaged ({error}); put a copy back, or give another --output") from error
