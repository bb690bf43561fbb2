"""The tokens before each segment, from the ranks that hold them: for windows and convolutions.

A window of w tokens needs the w - 1 tokens before a segment, cut at the start of its document, from
as many earlier ranks as they span. They are sent straight to the rank that needs them. The gradient
goes back the same way and is added.
"""

from dataclasses import dataclass
from typing import Any

import torch

from parallel.layout import Segment, SequenceLayout
from parallel.sequence.blocks import window_spans
from parallel.sequence.context import SequenceContext


@dataclass(frozen=True)
class _Transfer:
    """Rows of one rank that become rows of the halo of another."""

    source: int
    target: int
    rows: Segment
    halo: Segment


def fetch_halo(
    tensors: tuple[torch.Tensor, ...], context: SequenceContext, window_size: int
) -> tuple[torch.Tensor, ...]:
    """Return the rows before each of this rank's segments; every rank of the axis must call.

    Args:
        tensors: [1, T, ...] each, this rank's tokens, all of one dtype.
        window_size: the spans reach back window_size - 1 tokens.

    Returns:
        For each tensor [1, T_halo, ...], the spans of `window_spans` one after another. Gradients
        reach the ranks that the rows came from.
    """
    halos: tuple[torch.Tensor, ...] = _FetchHalo.apply(context, window_size, *tensors)
    return halos


def list_transfers(layout: SequenceLayout, window_size: int) -> list[_Transfer]:
    """Return all transfers of the axis, the same list on every rank."""
    transfers = []
    for target in range(layout.sp_size):
        offset = 0
        for span in window_spans(layout, target, window_size):
            for source in range(layout.sp_size):
                for segment, rows in zip(layout.segments[source], layout.rows(source), strict=True):
                    part = span & segment
                    if len(part):
                        transfers.append(
                            _Transfer(
                                source,
                                target,
                                part.shift(rows.start - segment.start),
                                part.shift(offset - span.start),
                            )
                        )
            offset += len(span)
    return transfers


class _FetchHalo(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, context: SequenceContext, window_size: int, *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        layout = context.layout
        transfers = list_transfers(layout, window_size)
        spans = window_spans(layout, layout.sp_rank, window_size)
        num_rows = sum(len(span) for span in spans)

        def fetch() -> tuple[torch.Tensor, ...]:
            halos = tuple(x.new_empty(1, num_rows, *x.shape[2:]) for x in tensors)
            received = _move(context, transfers, tensors, reverse=False)
            for transfer, parts in received:
                for halo, part in zip(halos, parts, strict=True):
                    halo[:, transfer.halo.rows] = part
            return halos

        ctx.context, ctx.transfers, ctx.shapes = context, transfers, [x.shape for x in tensors]
        return context.remember(fetch)

    @staticmethod
    def backward(ctx: Any, *dhalos: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # Rows that go to several ranks get several gradients.
        sums = [
            torch.zeros(shape, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
            for x, shape in zip(dhalos, ctx.shapes, strict=True)
        ]
        for transfer, parts in _move(ctx.context, ctx.transfers, dhalos, reverse=True):
            for total, part in zip(sums, parts, strict=True):
                total[:, transfer.rows.rows] += part
        return None, None, *(s.to(x.dtype) for s, x in zip(sums, dhalos, strict=True))


def _move(
    context: SequenceContext,
    transfers: list[_Transfer],
    tensors: tuple[torch.Tensor, ...],
    *,
    reverse: bool,
) -> list[tuple[_Transfer, tuple[torch.Tensor, ...]]]:
    """Send rows to the ranks that need them, in reverse halo rows to where they came from.

    Returns:
        What arrived here, own rows included: per transfer, its rows of each tensor.
    """
    own = context.layout.sp_rank
    outgoing: dict[int, list[torch.Tensor]] = {}
    incoming: dict[int, list[_Transfer]] = {}
    arrived: list[tuple[_Transfer, tuple[torch.Tensor, ...]]] = []
    for transfer in transfers:
        ends = (transfer.source, transfer.target)
        source, target = reversed(ends) if reverse else ends
        rows = (transfer.halo if reverse else transfer.rows).rows
        if source == own == target:
            arrived.append((transfer, tuple(x[:, rows] for x in tensors)))
        elif source == own:
            outgoing.setdefault(target, []).extend(x[:, rows].flatten() for x in tensors)
        elif target == own:
            incoming.setdefault(source, []).append(transfer)
    widths = [x.shape[2:] for x in tensors]
    sends = {rank: torch.cat(parts) for rank, parts in outgoing.items()}
    receives = {
        rank: tensors[0].new_empty(
            sum(len(t.rows) for t in transfers) * sum(w.numel() for w in widths)
        )
        for rank, transfers in incoming.items()
    }
    if context.comm.mesh.sp_size > 1:
        context.comm.exchange("halo", sends, receives, context.comm.mesh.sp).wait()
        context.comm.settle(context.comm.mesh.sp)
    for rank, buffer in receives.items():
        sizes = [len(t.rows) * width.numel() for t in incoming[rank] for width in widths]
        parts = iter(buffer.split(sizes))
        for transfer in incoming[rank]:
            shapes = ((1, len(transfer.rows), *width) for width in widths)
            arrived.append((transfer, tuple(next(parts).view(shape) for shape in shapes)))
    return arrived
