"""The flight recorder: what each rank does and last completed, for the message when one fails.

Every rank keeps a small file in a folder that all share. It is overwritten in place, a few
microseconds each time, so that it also tells of a rank that was killed or stopped.
"""

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch.distributed as dist

RECORD_BYTES, MAX_NAME = 4096, 200
"""Of a file, and characters of a name in it."""
GONE = ("connection closed", "connection reset", "broken pipe", "remote process exited")
"""What gloo and NCCL say when a process at the other end is no more."""
DYING_SECONDS = 1.0
"""A process that was killed is gone after so long at the most."""
CLOCK_SKEW_SECONDS = 10.0
"""By so much the clocks of hosts may differ."""


class CommunicationError(RuntimeError):
    """A collective did not come to its end: a rank died, stopped or left the order."""


def is_of_a_group(error: Exception) -> bool:
    """Return whether PyTorch's process groups raised it; gloo has no class of its own."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()


@dataclass(frozen=True)
class Note:
    """What a rank last wrote down."""

    time: float = 0.0
    """Seconds of the clock of its host."""
    host: str = ""
    process: int = 0
    step: int = 0
    """Of the training."""
    count: int = 0
    """Collectives it has completed."""
    completed: str = ""
    pending: str = ""
    """What it is in; empty while it computes by itself."""
    failed: str = ""
    """How its own run ended, for a rank that has told already."""


class FlightRecorder:
    """Notes of one rank; without a folder they stay in memory.

    Args:
        folder: shared by the ranks of the run, made here.
        rank: of the world.
        world_size: ranks whose notes `describe` reads.

    Attributes:
        step: of the training, for messages; the trainer keeps it.
    """

    def __init__(self, folder: Path | None = None, rank: int = 0, world_size: int = 1) -> None:
        self.folder, self.rank, self.world_size = folder, rank, world_size
        self.step = self.count = 0
        self.completed = self.failed = ""
        self._pending: list[str] = []
        self._began = self._started = time.time()
        self._place = {"host": socket.gethostname(), "process": os.getpid()}
        self._file: int | None = None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            if rank == 0:
                for path in folder.glob("rank_*.json"):  # of an earlier run on more ranks
                    if int(path.stem.removeprefix("rank_")) >= world_size:
                        path.unlink(missing_ok=True)
            self._file = os.open(self._path(rank), os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
            self._write()

    @property
    def pending(self) -> str:
        """The innermost of what goes on."""
        return self._pending[-1] if self._pending else ""

    @contextmanager
    def watch(self, what: str, *, is_pure: bool = True, is_noted: bool = True) -> Iterator[None]:
        """Note that `what` goes on; a collective that fails inside is told with all notes.

        Args:
            is_pure: nothing but communication goes on, so that every error is one of it. Otherwise
                only the errors of PyTorch's process groups are, and others are left as they are.
            is_noted: the start of what is waited for later need not be.

        Raises:
            CommunicationError: a collective failed.
        """
        self._begin(what, is_noted)
        try:
            yield
        except CommunicationError:
            raise  # told already, by what went on inside
        except RuntimeError as error:
            if not is_pure and not is_of_a_group(error):
                self._pending.pop()
                raise
            raise CommunicationError(self.describe(error)) from error
        self._pending.pop()
        if is_noted:
            self.count += 1
            self.completed = what
            self._write()

    def _begin(self, what: str, is_noted: bool) -> None:
        self._pending.append(what)
        self._began = time.time()
        if is_noted:
            self._write()

    def describe(self, error: BaseException) -> str:
        """Return what failed here, what each rank had last completed, and who is likely at fault.

        It goes into this rank's note as well, so that the others know who has told already.
        """
        now = time.time()
        self.failed = f"{self.pending} failed: {_explain(error, now - self._began)}"
        place = f"in step {self.step}" if self.step else "before the first step"
        lines = [f"rank {self.rank}: {place}, {self.failed}"]
        if self._file is None:
            return lines[0]
        self._write()
        os.fsync(self._file)  # so that other hosts see it
        notes, states = self._survey(_is_gone(error))
        for rank, (note, state) in enumerate(zip(notes, states, strict=True)):
            lines.append(f"  rank {rank}: {_tell(note, state, now)}")
        return "\n".join([*lines, f"  most likely at fault: {self._blame(notes, states)}"])

    def close(self) -> None:
        """Remove this rank's file, at the end of a run that went well."""
        if self._file is None or self.folder is None:
            return
        os.close(self._file)
        self._file = None
        self._path(self.rank).unlink(missing_ok=True)
        with suppress(OSError):  # the last rank finds the folder empty
            self.folder.rmdir()

    def _path(self, rank: int) -> Path:
        assert self.folder is not None, "notes in memory have no file"
        return self.folder / f"rank_{rank:05d}.json"

    def _write(self) -> None:
        if self._file is None:
            return
        note = {
            **self._place,
            "time": time.time(),
            "step": self.step,
            "count": self.count,
            "completed": self.completed[:MAX_NAME],
            "pending": self.pending[:MAX_NAME],
            "failed": self.failed[:MAX_NAME],
        }
        os.pwrite(self._file, json.dumps(note).encode().ljust(RECORD_BYTES), 0)

    def _read(self, rank: int) -> Note | None:
        """Return the note of a rank, None if it has left none in this run."""
        try:
            note = Note(**json.loads(self._path(rank).read_text()))
        except (OSError, ValueError, TypeError):
            return None
        return note if note.time > self._started - CLOCK_SKEW_SECONDS else None

    def _survey(self, is_gone: bool) -> tuple[list[Note | None], list[str]]:
        """Read the notes of all ranks and what is wrong with their processes.

        A dying process closes its connections before it is seen to be gone (`is_gone`: one is).
        """
        deadline = time.monotonic() + DYING_SECONDS
        while True:
            notes = [self._read(rank) for rank in range(self.world_size)]
            states = [_find_state(note) for note in notes]
            states[self.rank] = ""
            if any(states) or not is_gone or time.monotonic() > deadline:
                return notes, states
            time.sleep(0.02)

    def _blame(self, notes: list[Note | None], states: list[str]) -> str:
        """Return the ranks most likely at fault, with the reason.

        A rank that has told of its own failure was waiting. Of the others it is one whose process
        is no more or is stopped; or, where that cannot be seen, the one silent for longest.
        """
        silent = {
            rank: note
            for rank, note in enumerate(notes)
            if rank != self.rank and not (note and note.failed)
        }
        for reason in ("whose process is gone", "whose process is stopped"):
            found = [str(rank) for rank in silent if states[rank] == reason]
            if found:
                return f"rank {' and '.join(found)}, {reason}"
        if not silent:
            return "none of the other ranks, which waited as well; this one, or the network"
        oldest = min(silent, key=lambda rank: note.time if (note := silent[rank]) else 0.0)
        return f"rank {oldest}, silent for longest"


def _find_state(note: Note | None) -> str:
    """Return what is wrong with a process on this host; empty if nothing, or on another host."""
    if note is None or note.host != socket.gethostname():
        return ""
    try:
        status = psutil.Process(note.process).status()
    except psutil.Error:
        return "whose process is gone"
    if status in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
        return "whose process is gone"
    return "whose process is stopped" if status == psutil.STATUS_STOPPED else ""


def _tell(note: Note | None, state: str, now: float) -> str:
    if note is None:
        return "has left no note in this run"
    number = f" (collective {note.count}, in step {note.step})" if note.count else ""
    text = f"last completed {note.completed or 'nothing'}{number}"
    if note.failed:
        return f"{text}; then {note.failed}"
    place = f"in {note.pending}" if note.pending else "computing"
    text = f"{text}; since {max(0.0, now - note.time):.1f} s {place}"
    return f"{text}, {state.removeprefix('whose ')}" if state else text


def _explain(error: BaseException, seconds: float) -> str:
    """Return an error of a process group in plain words."""
    text = (str(error) or type(error).__name__).splitlines()[0]
    lower = text.lower()
    if any(word in lower for word in ("timed out", "timeout")):
        return f"no answer in {seconds:.1f} s (parallel.timeout_seconds is the limit)"
    if _is_gone(error):
        return "a rank it talks to is gone, its connection is closed"
    return text


def _is_gone(error: BaseException) -> bool:
    """Return whether a process group says that a process at the other end is no more."""
    return any(word in str(error).lower() for word in GONE)
