"""Collectives of our own: each is timed, enters the ledger and the flight recorder, and ends with
an error instead of a hang. DeepSpeed's are absorbed by `engine`.

Tensors travel as bytes, so that every backend takes every dtype.
"""

import dataclasses
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.distributed as dist

from parallel.flight_recorder import FlightRecorder
from parallel.ledger import Ledger
from parallel.mesh import Axis, Mesh


@dataclass(frozen=True)
class Comm:
    """The collectives of this rank, on behalf of one layer. A single rank sends nothing.

    Attributes:
        mesh: the axes.
        ledger: takes calls, bytes and seconds.
        recorder: takes what goes on.
        sync: what `settle` does after the communication of an algorithm: none; device (wait until
            the device is through); barrier (that, and until all ranks of the axis are there).
        layer: name of the layer that asks, for messages.
        kind: its kind, for the ledger.
    """

    mesh: Mesh = field(default_factory=lambda: Mesh(0, 1, 0, torch.device("cpu")))
    ledger: Ledger = field(default_factory=Ledger)
    recorder: FlightRecorder = field(default_factory=FlightRecorder)
    sync: Literal["none", "device", "barrier"] = "none"
    layer: str = ""
    kind: str = ""

    def at(self, *, layer: str | None = None, kind: str | None = None) -> "Comm":
        """Return the same collectives on behalf of another layer, or of another kind in it."""
        return dataclasses.replace(self, layer=layer or self.layer, kind=kind or self.kind)

    def all_reduce_sum(self, x: torch.Tensor, axis: Axis, name: str | None = None) -> torch.Tensor:
        """Return the sum of `x` over the ranks of `axis`; every rank of it must call.

        A ring all-reduce sends 2 (P - 1) / P of the tensor from each rank.

        Args:
            name: of the axis in the ledger, where it is not its own.
        """
        if axis.size == 1:
            return x
        x = x.clone()
        num_bytes = 2 * (axis.size - 1) * _count_bytes(x) // axis.size
        with self._entry(axis, "all_reduce", num_bytes, name):
            dist.all_reduce(x, group=axis.group)
        return x

    def all_gather(self, x: torch.Tensor, axis: Axis) -> torch.Tensor:
        """Return [P, *x.shape], the tensors of all ranks in order; every rank must call.

        Each rank sends its own to the P - 1 others.
        """
        if axis.size == 1:
            return x[None]
        gathered = x.new_empty(axis.size, *x.shape)
        with self._entry(axis, "all_gather", (axis.size - 1) * _count_bytes(x)):
            parts = list(_as_bytes(gathered).view(axis.size, -1).unbind(0))
            dist.all_gather(parts, _as_bytes(x.contiguous()), group=axis.group)
        return gathered

    def all_to_all(self, parts: list[torch.Tensor], shapes: list[torch.Size], axis: Axis) -> list[
        torch.Tensor
    ]:  # fmt: skip
        """Send `parts[i]` to rank i of the axis and return what came from each; every rank calls.

        Args:
            shapes: of what comes from each rank, in the dtype of the parts.
        """
        if axis.size == 1:
            return parts
        flat = torch.cat([_as_bytes(part.contiguous()) for part in parts])
        sent, itemsize = [_count_bytes(part) for part in parts], parts[0].element_size()
        received = [shape.numel() * itemsize for shape in shapes]
        buffer = flat.new_empty(sum(received))
        with self._entry(axis, "all_to_all", sum(sent) - sent[axis.index]):
            dist.all_to_all_single(buffer, flat, received, sent, group=axis.group)
        pieces = buffer.split(received)
        return [
            piece.view(parts[0].dtype).view(shape)
            for piece, shape in zip(pieces, shapes, strict=True)
        ]

    def start_all_to_all(
        self, x: torch.Tensor, sends: list[int], receives: list[int], axis: Axis, name: str
    ) -> "Arrival":
        """Start to send the rows of `x` to the ranks of the axis; every rank of it must call.

        Args:
            x: [rows, ...], those for rank 0 first.
            sends: rows for each rank.
            receives: rows from each rank, which stand in that order in what arrives.
            name: of the collective in the ledger.
        """
        x = x.contiguous()
        if axis.size == 1:
            return Arrival(nullcontext(), None, (x, x))
        width = math.prod(x.shape[1:]) * x.element_size()
        arrived = x.new_empty(sum(receives), *x.shape[1:])
        with self.recorder.watch(f"the start of {self._name(name, axis.name)}", is_noted=False):
            work = dist.all_to_all_single(
                _as_bytes(arrived),
                _as_bytes(x),
                [n * width for n in receives],
                [n * width for n in sends],
                group=axis.group,
                async_op=True,
            )
        entry = self._entry(axis, name, (len(x) - sends[axis.index]) * width)
        return Arrival(entry, work, (x, arrived))

    def exchange(
        self,
        collective: str,
        sends: Mapping[int, torch.Tensor],
        receives: Mapping[int, torch.Tensor],
        axis: Axis,
        part: str = "",
    ) -> "Exchange":
        """Start to send to and receive from ranks of the axis; `wait` on what is returned.

        Args:
            collective: its name in the ledger.
            sends: contiguous tensors by index in the axis; they must not change until the wait.
            receives: contiguous tensors to fill, by index in the axis.
            part: which part of the collective it is, for messages, such as "step 1 of 3".
        """
        work = [
            dist.P2POp(operation, _as_bytes(x), axis.ranks[index], axis.group)
            for operation, tensors in ((dist.isend, sends), (dist.irecv, receives))
            for index, x in tensors.items()
            if x.numel()
        ]
        num_bytes = sum(_count_bytes(x) for x in sends.values())
        name = self._name(collective, axis.name, part)
        with self.recorder.watch(f"the start of {name}", is_noted=False):
            handles = dist.batch_isend_irecv(work) if work else []
        entry = self._entry(axis, collective, num_bytes, part=part)
        return Exchange(entry, handles, (sends, receives))

    def settle(self, axis: Axis) -> None:
        """Synchronise as `sync` says; every rank of the axis calls it after an algorithm."""
        if self.sync == "none" or axis.size == 1:
            return
        if self.mesh.device.type != "cpu":
            with self.recorder.watch(self._name("wait for the device", axis.name), is_pure=False):
                torch.accelerator.synchronize(self.mesh.device)
        if self.sync == "barrier":
            with self._entry(axis, "barrier", 0):
                dist.barrier(group=axis.group)

    def broadcast_object(self, value: str | None, name: str = "an object") -> str | None:
        """Return rank 0's `value` on every rank of the world; every rank must call."""
        if self.mesh.world_size == 1:
            return value
        box = [value]
        with self.recorder.watch(f"broadcast of {name}"):
            dist.broadcast_object_list(box, src=0)
        return box[0]

    @contextmanager
    def _entry(
        self, axis: Axis, collective: str, num_bytes: int, name: str | None = None, part: str = ""
    ) -> Iterator[None]:
        """Time a collective and note it."""
        name = name or axis.name
        start = time.perf_counter()
        with self.recorder.watch(self._name(collective, name, part)):
            yield
        seconds = time.perf_counter() - start
        self.ledger.record(name, collective, num_bytes, seconds, kind=self.kind)

    def _name(self, collective: str, axis: str, part: str = "") -> str:
        what = f"{collective}, {part}," if part else collective
        place = f" of {self.layer} ({self.kind})" if self.layer else ""
        return f"{what}{place} on axis {axis}"


class Exchange:
    """Point-to-point messages under way."""

    def __init__(
        self,
        entry: AbstractContextManager[None],
        handles: list[dist.Work],
        tensors: tuple[Mapping[int, torch.Tensor], Mapping[int, torch.Tensor]],
    ) -> None:
        self._entry, self._handles = entry, handles
        self._tensors = tensors  # must live until the messages have gone

    def wait(self) -> None:
        """Return when all have been sent and received.

        Raises:
            CommunicationError: a rank died, or the timeout of the axis has passed.
        """
        with self._entry:
            for handle in self._handles:
                handle.wait()


class Arrival:
    """Rows of an all-to-all under way."""

    def __init__(
        self,
        entry: AbstractContextManager[None],
        work: dist.Work | None,
        tensors: tuple[torch.Tensor, torch.Tensor],
    ) -> None:
        self._entry, self._work = entry, work
        self._sent, self._arrived = tensors

    def wait(self) -> torch.Tensor:
        """Return what has arrived, [rows, ...].

        Raises:
            CommunicationError: a rank died, or the timeout of the axis has passed.
        """
        with self._entry:
            if self._work is not None:
                self._work.wait()
        return self._arrived


def _count_bytes(x: torch.Tensor) -> int:
    return x.numel() * x.element_size()


def _as_bytes(x: torch.Tensor) -> torch.Tensor:
    """View a contiguous tensor as flat bytes."""
    return x.view(-1).view(torch.uint8)
