"""The checkpoints of a run: written aside, verified, two of them kept; all else in their folder stays."""

import logging
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sparsifiner.files import sync
from sparsifiner.training.seal import find_damage, mark_of, seal, sealed_names

_logger = logging.getLogger(__name__)

_NAME = re.compile(r"\d{2,}-\d{8,}")
# endings of the names that a folder has before it is a checkpoint, and when it is none any more
_ASIDE, _AWAY = "unfinished", "removed"


@dataclass(frozen=True, order=True)
class Position:
    """How far a run is.

    Attributes:
        stage: index of the stage.
        step: optimizer steps done in it.
    """

    stage: int = 0
    step: int = 0

    @property
    def name(self) -> str:
        """Name of the checkpoint's folder."""
        return f"{self.stage:02d}-{self.step:08d}"

    @classmethod
    def of(cls, checkpoint: Path) -> "Position":
        """Where a checkpoint stands, by its name."""
        stage, _, step = checkpoint.name.partition("-")
        return cls(int(stage), int(step))


class Checkpoints:
    """The checkpoints of one run, in a folder that may hold other things, or be a link to another disk.

    Its seal tells of each checkpoint which run wrote it, and whether its files are as they were written:
    whatever is missing, cut or changed is found before anything is loaded. The newest two are kept, so that
    there is one to fall back on; while another is written there are three. Removed is only what this run
    wrote: folders that have the name of a position and its mark inside, and those with the run in their name,
    which a kill left behind; what others put into one keeps it from being removed, and links are never
    followed. A damaged checkpoint stays until another one is written and verified. Those of versions without
    seals are loaded and never removed.

    Args:
        folder: made when the first one is saved.
        run: names the run, 32 hexadecimal digits.
        newest: the one that the run goes on from.
    """

    def __init__(self, folder: Path, run: str, newest: Path | None = None) -> None:
        self.folder = folder
        self.run = run
        self.newest = newest
        self._told: set[Path] = set()

    def choose(self) -> Path | None:
        """The newest intact checkpoint, None if there is none at all; a warning names each damaged one.

        Raises:
            ValueError: all checkpoints of this run are damaged, or all that are there are of other runs.
        """
        named = named_checkpoints(self.folder)
        # where nothing tells, all may be damaged, or an older version wrote it
        own = [checkpoint for checkpoint in named if (mark_of(checkpoint) or [self.run])[0] == self.run]
        if named and not own:
            raise ValueError(
                f"{self.folder} holds checkpoints of other runs only; put those of this run back, or give "
                "another --output"
            )
        damaged: dict[Path, str] = {}
        for checkpoint in own:
            damage = find_damage(checkpoint)
            if damage is None:
                for each, reason in damaged.items():
                    _logger.warning(
                        "sparsifiner: checkpoint %s is damaged: %s; the run goes on from the one before, %s",
                        each,
                        reason,
                        checkpoint.name,
                    )
                return checkpoint
            damaged[checkpoint] = damage
        if damaged:
            reasons = "; ".join(f"{checkpoint.name}: {reason}" for checkpoint, reason in damaged.items())
            raise ValueError(
                f"no checkpoint in {self.folder} is intact ({reasons}); put a copy of one back, or give "
                "another --output"
            )
        return None

    def save(
        self, position: Position, save: Callable[[Path], None], wait: Callable[[], None], *, writes: bool
    ) -> None:
        """Saves a checkpoint, and removes those before the previous one; all processes call this.

        Args:
            position: where the run stands.
            save: writes the state into a folder.
            wait: waits for all processes.
            writes: whether this is the main process, which makes, verifies and removes folders.
        """
        aside = self.folder / f".{position.name}.{self.run}.{_ASIDE}"
        if writes:
            aside.mkdir(parents=True, exist_ok=True)
        wait()
        save(aside)
        wait()
        if writes:
            seal(aside, self.run, position.name)
            self._adopt(aside, self.folder / position.name)
        wait()

    def sweep(self) -> None:
        """Removes what a kill left of this run: checkpoints that were being written or removed."""
        endings = tuple(f".{self.run}.{ending}" for ending in (_ASIDE, _AWAY))
        for entry in _entries(self.folder):
            if entry.name.endswith(endings) and not entry.is_symlink():
                self._remove_tree(entry)

    def _adopt(self, aside: Path, final: Path) -> None:
        """Gives a checkpoint its name; where it then is intact, removes those before the previous one."""
        files = sealed_names(aside)
        if os.path.lexists(final) and not self._remove(final, files):
            self._warn(
                final, "is in the way of a checkpoint of this run, and none is saved here; move it away"
            )
            self._remove_tree(aside)
            return
        aside.rename(final)
        sync(self.folder)
        damage = find_damage(final)
        if damage is not None:
            self._warn(final, f"was written, but is damaged: {damage}; those before it stay")
            return
        kept = {final, self.newest}
        self.newest = final
        for checkpoint in named_checkpoints(self.folder):
            if checkpoint not in kept:
                self._remove(checkpoint, files)

    def _remove(self, checkpoint: Path, files: set[str]) -> bool:
        """Removes a checkpoint if this run wrote all of it; whether its name is free now.

        Args:
            checkpoint: an entry with the name of a position.
            files: names that the run gives to files, should its manifest not tell any more.
        """
        if checkpoint.is_symlink() or mark_of(checkpoint) != (self.run, checkpoint.name):
            return False
        others = {entry.name for entry in _entries(checkpoint)} - (sealed_names(checkpoint) or files)
        if others:
            self._warn(checkpoint, f"stays: this run did not write {min(others)} in it; move that away")
            return False
        # a kill amid the removal must leave nothing that looks like a checkpoint
        away = checkpoint.with_name(f".{checkpoint.name}.{self.run}.{_AWAY}")
        try:
            checkpoint.rename(away)
        except OSError as error:
            self._warn(checkpoint, f"could not be removed ({error}); remove it by hand")
            return False
        self._remove_tree(away)
        return True

    def _remove_tree(self, folder: Path) -> None:
        try:
            shutil.rmtree(folder)
        except OSError as error:
            self._warn(folder, f"could not be removed ({error}); remove it by hand")

    def _warn(self, path: Path, what: str) -> None:
        """Says something of a folder once."""
        if path not in self._told:
            self._told.add(path)
            _logger.warning("sparsifiner: %s %s", path, what)


def named_checkpoints(folder: Path) -> list[Path]:
    """Folders, or links to folders, that have the name of a position, the newest first."""
    named = [entry for entry in _entries(folder) if _NAME.fullmatch(entry.name) and entry.is_dir()]
    return sorted(named, key=Position.of, reverse=True)


def _entries(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []
