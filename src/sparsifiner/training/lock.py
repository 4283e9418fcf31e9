"""One process at a time in the folder of a run."""

import os
import platform
from pathlib import Path

from filelock import FileLock, Timeout

from sparsifiner.files import write_aside

_LOCK = ".lock"
# tells who holds the lock, and holds nothing itself: it may be left of a process that was killed
_OWNER = ".owner"


class FolderLock:
    """Taken when it is made; the operating system takes it back from a process that ends, however it ends.

    The file of the lock stays in the folder: who removed it would part those who wait for it.

    Args:
        folder: to lock; made if it is missing.

    Raises:
        BlockingIOError: another process holds the lock.
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lock = FileLock(folder / _LOCK)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.lock.acquire(blocking=False)
        except Timeout:
            raise BlockingIOError(
                f"output={str(folder)!r} is in use by {self._owner()}; wait until it ends, or give another "
                "--output"
            ) from None
        except OSError as error:
            raise OSError(
                f"output={str(folder)!r} cannot be written ({error}); give another --output"
            ) from error
        owner = f"process {os.getpid()} on {platform.node()}"
        write_aside(folder / _OWNER, lambda file: file.write_text(owner))

    def release(self) -> None:
        """Lets the next process in."""
        (self.folder / _OWNER).unlink(missing_ok=True)
        self.lock.release()

    def _owner(self) -> str:
        try:
            return (self.folder / _OWNER).read_text()
        except (OSError, UnicodeDecodeError):  # it has only begun
            return "another process"
