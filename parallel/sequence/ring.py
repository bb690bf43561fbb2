"""Attention by blocks of keys that come one after another, the last ones around a ring of ranks.

Section 2 of arXiv:2310.01889 with the merge by log-sum-exp: at each step a rank attends to the
keys that have arrived while the next ones are on their way. The backward pass sends the keys around
again, and with them their gradients, which after a full turn are home. With the log-sum-exp over
all keys, every block's share of the gradient is what its operator's backward pass returns.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from ops.attention import attention_bwd, attention_fwd, merge
from ops.attention.settings import Settings
from parallel.layout import SequenceLayout
from parallel.sequence.blocks import Block, blocks_between
from parallel.sequence.context import SequenceContext


class Keys(NamedTuple):
    """Keys and values that are here, and which queries see them."""

    k: torch.Tensor
    """[1, rows, H_kv, D]."""
    v: torch.Tensor
    blocks: tuple[Block, ...]


def attend(
    q: torch.Tensor,
    keys: tuple[Keys, ...],
    layout: SequenceLayout,
    context: SequenceContext,
    *,
    window_size: int | None = None,
    is_ring: bool = False,
) -> torch.Tensor:
    """Return attention over all blocks of keys; with `is_ring` every rank of the ring must call.

    Args:
        q: [1, T, H, D].
        keys: the first are the rank's own, with the own block in front; in a ring they go round.
        layout: of the ranks of the ring; its own documents bound the own block.
        window_size: of the own block.

    Returns:
        [1, T, H, D] in the dtype of q.
    """
    blocks = tuple(each.blocks for each in keys)
    is_ring = is_ring and layout.sp_size > 1
    plan = _Plan(context, layout, blocks, window_size, is_ring)
    tensors = [x for each in keys for x in (each.k, each.v)]
    out: torch.Tensor = _Attend.apply(plan, q, *tensors)
    return out


@dataclass(frozen=True)
class _Plan:
    context: SequenceContext
    layout: SequenceLayout
    blocks: tuple[tuple[Block, ...], ...]
    """Per pair of keys and values that are here."""
    window_size: int | None
    is_ring: bool

    def settings(self, block: Block, q: torch.Tensor) -> Settings:
        scale = q.shape[-1] ** -0.5
        if block.pattern == "own":
            return Settings(True, self.window_size, 0, scale, self.layout.local_documents)
        return Settings(block.pattern == "late", None, 0, scale, None)

    def forward(
        self, q: torch.Tensor, tensors: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return out [1, T, H, D] and lse [1, H, T] over the keys of all blocks."""
        partial = _Partial(self, q)
        keys = _Round(self, (tensors[0], tensors[1]), "keys", self.layout.sp_size - 1)
        for index, blocks in enumerate(self.blocks):
            partial.add(tensors[2 * index], tensors[2 * index + 1], blocks)
        for k, v in keys.arrivals():
            partial.add(k, v, blocks_between(self.layout, keys.origin))
        keys.settle()
        assert partial.out is not None, "the own block comes first"
        return partial.out.to(q.dtype), partial.lse

    def backward(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        tensors: tuple[torch.Tensor, ...],
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return dq and the gradients of `tensors`."""
        gradient = _Gradient(self, dout, q, out, lse)
        keys = _Round(self, (tensors[0], tensors[1]), "keys", self.layout.sp_size - 1)
        grads = []
        for index, blocks in enumerate(self.blocks):
            k, v = tensors[2 * index : 2 * index + 2]
            grads.append(gradient.of(k, v, blocks))
        if self.is_ring:
            wide = torch.promote_types(q.dtype, torch.float32)
            own = (grads[0][0].to(wide), grads[0][1].to(wide))
            home = _Round(self, own, "gradients", self.layout.sp_size)
            for k, v in keys.arrivals():
                blocks = blocks_between(self.layout, keys.origin)
                parts = gradient.of(k, v, blocks) if blocks else ()
                for total, part in zip(home.receive(), parts, strict=False):
                    total += part
                home.send()
            grads[0] = home.receive()
            keys.settle()
        typed = [x.to(q.dtype) for pair in grads for x in pair]
        assert gradient.dq is not None, "the own block comes first"
        return gradient.dq.to(q.dtype), typed


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: _Plan, q: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        remember = plan.context.remember if plan.is_ring else lambda compute: compute()
        out, lse = remember(lambda: plan.forward(q, tensors))
        ctx.save_for_backward(q, out, lse, *tensors)
        ctx.plan = plan
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, out, lse, *tensors = ctx.saved_tensors
        dq, grads = ctx.plan.backward(dout, q, out, lse, tuple(tensors))
        return None, dq, *grads


class _Partial:
    """The result over the keys seen so far: of one block as it is, of several in float32."""

    def __init__(self, plan: _Plan, q: torch.Tensor) -> None:
        self.plan, self.q = plan, q
        self.out: torch.Tensor | None = None
        self.lse = q.new_empty(0)

    def add(self, k: torch.Tensor, v: torch.Tensor, blocks: tuple[Block, ...]) -> None:
        impl = self.plan.context.ops.attention
        for block in blocks:
            q, k_seen, v_seen = _cut(block, (self.q,), (k, v))
            settings = self.plan.settings(block, q)
            out, lse = attention_fwd(q, k_seen, v_seen, settings, impl=impl)
            if block.pattern == "late":
                out, lse = out.flip(1), lse.flip(2)
            if self.out is None:
                self.out, self.lse = out, lse
                continue
            if self.out.dtype.itemsize == 2:
                self.out = self.out.float()
            rows = block.queries.rows
            merged = merge(self.out[:, rows], self.lse[:, :, rows], out, lse, impl=impl)
            self.out[:, rows], self.lse[:, :, rows] = merged


class _Gradient:
    """Gradients of one backward pass; dq grows with every block of keys."""

    def __init__(
        self, plan: _Plan, dout: torch.Tensor, q: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
    ) -> None:
        self.plan, self.queries, self.lse = plan, (dout, q, out), lse
        self.dq: torch.Tensor | None = None

    def of(
        self, k: torch.Tensor, v: torch.Tensor, blocks: tuple[Block, ...]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return dk and dv and add to dq: of one block as they are, of several in float32."""
        has_all_rows = bool(blocks) and len(blocks[0].keys) == k.shape[1]
        dk, dv = (None if has_all_rows else _zeros(x) for x in (k, v))
        for block in blocks:
            dout, q, out, k_seen, v_seen = _cut(block, self.queries, (k, v))
            lse = self.lse[:, :, block.queries.rows]
            lse = lse.flip(2) if block.pattern == "late" else lse
            grads = attention_bwd(
                dout, None, q, k_seen, v_seen, out, lse, self.plan.settings(block, q),
                impl=self.plan.context.ops.attention,
            )  # fmt: skip
            parts = [x.flip(1) for x in grads] if block.pattern == "late" else grads
            self.dq = _add(self.dq, block.queries.rows, parts[0])
            dk = _add(dk, block.keys.rows, parts[1])
            dv = _add(dv, block.keys.rows, parts[2])
        assert dk is not None, "zeros or the first block have all rows"
        assert dv is not None, "zeros or the first block have all rows"
        return dk, dv


class _Round:
    """A pair of tensors of each place of the ring on its way round, handed on step by step.

    Where there is no ring nothing arrives.
    """

    def __init__(
        self, plan: _Plan, pair: tuple[torch.Tensor, torch.Tensor], name: str, num_steps: int
    ) -> None:
        """Start to hand on this place's pair, which takes `num_steps` steps in all."""
        self.plan, self.name = plan, name
        self.axis, self.comm = plan.context.comm.mesh.ring, plan.context.comm
        self.num_steps, self.step = num_steps if plan.is_ring else 0, 0
        self.origin = self.axis.index
        """Place whose pair is here."""
        if self.num_steps:
            self.here = torch.stack(pair)
            self.send()

    def send(self) -> None:
        """Start to hand on what is here; it must not change until the next arrival."""
        self.step += 1
        following, before = ((self.axis.index + step) % self.axis.size for step in (1, -1))
        shape = list(self.here.shape)
        shape[2] = self.plan.layout.count((self.origin - 1) % self.axis.size)
        self.coming = self.here.new_empty(shape)
        part = f"step {self.step} of {self.num_steps} of the {self.name}"
        self.exchange = self.comm.exchange(
            "ring", {following: self.here}, {before: self.coming}, self.axis, part
        )

    def receive(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Wait for the pair of the place before."""
        self.exchange.wait()
        self.here, self.origin = self.coming, (self.origin - 1) % self.axis.size
        return self.here[0], self.here[1]

    def arrivals(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield each pair that arrives while the one before is used and handed on."""
        for _ in range(self.num_steps):
            pair = self.receive()
            if self.step < self.num_steps:
                self.send()
            yield pair

    def settle(self) -> None:
        """Synchronise the ring, if there is one."""
        if self.num_steps:
            self.comm.settle(self.axis)


def _cut(
    block: Block, queries: tuple[torch.Tensor, ...], keys: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, ...]:
    """Return the block's rows of [1, rows, ...] tensors, a late block's in reversed time."""
    parts = [x[:, block.queries.rows] for x in queries] + [x[:, block.keys.rows] for x in keys]
    return tuple(x.flip(1) for x in parts) if block.pattern == "late" else tuple(parts)


def _add(total: torch.Tensor | None, rows: slice, part: torch.Tensor) -> torch.Tensor:
    """Add to rows of the total; what comes first has all rows and becomes the total."""
    if total is None:
        return part
    total = total.to(torch.promote_types(total.dtype, torch.float32))
    total[:, rows] += part
    return total


def _zeros(x: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
