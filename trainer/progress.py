"""What a person sees of a running training: a bar on a terminal, plain lines elsewhere."""

import logging
import sys
import time
from types import TracebackType
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

logger = logging.getLogger(__name__)


class Progress:
    """Shows steps, loss, tokens/s, MFU and the time left."""

    def __init__(self, first: int, steps: int, log_every: int, *, enabled: bool) -> None:
        self.first, self.steps, self.log_every = first, steps, log_every
        self.enabled = enabled
        self.started = time.monotonic()
        self.bar = None
        if enabled and sys.stderr.isatty():
            columns = (
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"), TimeRemainingColumn(),
            )  # fmt: skip
            self.bar = RichProgress(*columns)
            self.task = self.bar.add_task("train", total=steps, completed=first, figures="")

    def __enter__(self) -> "Progress":
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def step(self, record: dict[str, Any]) -> None:
        """Show one step's record."""
        if not self.enabled:
            return
        step = record["step"]
        if record["loss"] is None:
            logger.warning("step %d skipped: %s", step, record["reason"])
            return
        figures = (
            f"loss {record['loss']:.4f}  {record['tokens_per_second']:,.0f} tokens/s  "
            f"MFU {record['mfu']:.1%}"
        )
        if self.bar is not None:
            self.bar.update(self.task, completed=step, figures=figures)
        elif step % self.log_every == 0 or step in (self.first + 1, self.steps):
            left = (time.monotonic() - self.started) / (step - self.first) * (self.steps - step)
            logger.info("step %d/%d  %s  %.0f s left", step, self.steps, figures, left)

    def evaluation(self, record: dict[str, Any]) -> None:
        """Show one evaluation's record."""
        if self.enabled:
            logger.info(
                "step %d  validation loss %.4f nats/token, %.4f bits/byte",
                record["step"],
                record["val_loss"],
                record["val_bits_per_byte"],
            )
