"""The flight recorder: what each rank does and last completed, for the message when one fails.

Every rank keeps a small file in a folder that all share. It is overwritten in place, a few
microseconds each time, so that it also tells of a rank that was killed or stopped.
"""

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

RECORD_BYTES = 512


class CommunicationError(RuntimeError):
    """A collective did not come to its end: a rank died, stopped or left the order."""


class FlightRecorder:
    """Notes of one rank; without a folder they stay in memory.

    Args:
        folder: shared by the ranks of the run, made here.
        rank: of the world.
        world_size: ranks whose notes `describe` reads.
    """

    def __init__(self, folder: Path | None = None, rank: int = 0, world_size: int = 1) -> None:
        self.folder, self.rank, self.world_size = folder, rank, world_size
        self.count = 0
        self.pending: str | None = None
        self.completed: str | None = None
        self._file: int | None = None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self._path(rank), os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            self._write()

    @contextmanager
    def watch(self, what: str) -> Iterator[None]:
        """Note that `what`, a collective, goes on; what fails inside is told with all notes.

        Raises:
            CommunicationError: the collective failed.
        """
        self.begin(what)
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, CommunicationError):
                raise
            raise CommunicationError(self.describe(error)) from error
        self.complete(what)

    def begin(self, what: str) -> None:
        self.pending = what
        self._write()

    def complete(self, what: str) -> None:
        self.count += 1
        self.pending, self.completed = None, what
        self._write()

    def describe(self, error: BaseException) -> str:
        """Return what this rank waited for and what each rank had last completed."""
        lines = [f"rank {self.rank}: {self.pending} failed: {_first_line(error)}"]
        lines += [f"  rank {rank}: {self._read(rank)}" for rank in range(self.world_size)]
        return "\n".join(lines)

    def close(self) -> None:
        """Remove this rank's file, at the end of a run that went well."""
        if self._file is None or self.folder is None:
            return
        os.close(self._file)
        self._file = None
        self._path(self.rank).unlink(missing_ok=True)
        if not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _path(self, rank: int) -> Path:
        assert self.folder is not None, "notes in memory have no file"
        return self.folder / f"rank_{rank:05d}.json"

    def _write(self) -> None:
        if self._file is None:
            return
        note = {
            "time": time.time(),
            "count": self.count,
            "completed": self.completed,
            "pending": self.pending,
        }
        text = json.dumps(note).encode()[:RECORD_BYTES]
        os.pwrite(self._file, text.ljust(RECORD_BYTES), 0)

    def _read(self, rank: int) -> str:
        if rank == self.rank:
            note = {"completed": self.completed, "pending": self.pending, "count": self.count}
            return _tell(note, None)
        if self.folder is None:
            return "unknown (no folder is shared)"
        try:
            note = json.loads(self._path(rank).read_text())
        except (OSError, ValueError):
            return "unknown (it left no notes)"
        return _tell(note, time.time() - note["time"])


def _tell(note: Mapping[str, object], age: float | None) -> str:
    done = note["completed"] or "nothing"
    text = f"last completed {done} (collective {note['count']})"
    if note["pending"]:
        text += f", was in {note['pending']}"
    return text if age is None else f"{text}, noted {age:.1f} s ago"


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
