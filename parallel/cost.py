"""Bytes that ranks send, by formula, to share a sequence, experts, layers or the optimizer: no
tensor, no group.

Each is a published volume (ZeRO arXiv:1910.02054, Ulysses arXiv:2309.14509, ring arXiv:2310.01889,
LASP-2 arXiv:2502.07563, ZeCO arXiv:2507.01004, halo: the w - 1 tokens before a segment; experts
arXiv:2006.16668), summed over a layout, or over what routers chose, instead of over even shares. It
shares nothing with the code that sends.
"""

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

from parallel.layout import Segment, SequenceLayout

Key = tuple[str, str]
"""Axis and collective, as in the ledger."""


@dataclass(frozen=True)
class Traffic:
    """Payload bytes that one rank sends for one layer and micro batch, by axis and collective."""

    forward: Mapping[Key, int] = field(default_factory=dict)
    backward: Mapping[Key, int] = field(default_factory=dict)

    @property
    def total_bytes(self) -> int:
        """Of both passes, over all axes and collectives."""
        return sum(self.forward.values()) + sum(self.backward.values())

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(_add(self.forward, other.forward), _add(self.backward, other.backward))


@dataclass(frozen=True)
class SequenceCost:
    """What the rank `layout.sp_rank` sends.

    Attributes:
        layout: who holds which tokens.
        linear: how the states of linear attention reach the next ranks.
        itemsize: bytes of an activation. States, and gradients on their way round a ring, have
            four at least.
        recompute: mixers run again in the backward pass, and with them the all-to-all; what came
            by ring, halo or as a state was kept.
    """

    layout: SequenceLayout
    linear: Literal["gather", "scan"]
    itemsize: int
    recompute: bool = False

    def attention(
        self, num_heads: int, num_kv_heads: int, head_dim: int, window_size: int | None = None
    ) -> Traffic:
        """Return the traffic of softmax attention: full, or within a window of so many tokens."""
        if window_size is not None:
            return self._halo(window_size, 2 * num_kv_heads * head_dim)
        padded = pad_heads(num_heads, num_kv_heads, self.layout.ulysses)
        heads, kv_heads = (n // self.layout.ulysses for n in padded)
        return self._all_to_all(heads * head_dim, 2 * kv_heads * head_dim) + self._ring(
            2 * kv_heads * head_dim
        )

    def recurrent(
        self,
        num_state_heads: int,
        D_k: int,
        D_v: int,
        transition: Literal["none", "scalar", "vector", "dense"] = "none",
    ) -> Traffic:
        """Return the traffic of linear attention or the delta rule.

        Args:
            transition: what a state is multiplied by, for each head: 1, a number, a number for
                each key channel, or a matrix (the delta rule).
        """
        layout, itemsize = self.layout, max(4, self.itemsize)
        if layout.sp_size == 1:
            return Traffic()
        state = num_state_heads * D_k * D_v * itemsize
        if self.linear == "scan":
            order = sorted((s.start, rank) for rank, own in enumerate(layout.segments) for s in own)
            steps = Counter((a, b) for (_, a), (_, b) in itertools.pairwise(order) if a != b)
            key = ("sp", "state_scan")
            ahead = sum(n for (source, _), n in steps.items() if source == layout.sp_rank)
            back = sum(n for (_, source), n in steps.items() if source == layout.sp_rank)
            return Traffic({key: ahead * state}, {key: back * state})
        widths = {"none": 0, "scalar": 1, "vector": D_k, "dense": D_k * D_k}
        decay = num_state_heads * widths[transition] * itemsize
        # A rank with fewer segments than another fills up, for all send as much.
        copies = (layout.sp_size - 1) * max(len(segments) for segments in layout.segments)
        key = ("sp", "all_gather")
        return Traffic({key: copies * (state + decay)}, {key: copies * state})

    def short_conv(self, channels: int, kernel_size: int) -> Traffic:
        """Return the traffic of a short convolution: a halo of kernel_size - 1 tokens."""
        return self._halo(kernel_size, channels)

    def _all_to_all(self, query: int, keys: int) -> Traffic:
        """Count exchanges of one rank's share of heads: elements per token of q, of k and v."""
        layout, size = self.layout, self.layout.ulysses
        if size == 1:
            return Traffic()
        first = layout.sp_rank // size * size
        others = sum(layout.count(rank) for rank in range(first, first + size)) - layout.num_tokens
        # Heads go out for the rank's own tokens, once to every other rank; tokens go back to the
        # others with the rank's own heads alone.
        to_heads, to_tokens = (size - 1) * layout.num_tokens, others
        forward = (to_heads * (query + keys) + to_tokens * query) * self.itemsize
        backward = (to_heads * query + to_tokens * (query + keys)) * self.itemsize
        key = ("ulysses", "all_to_all")
        return Traffic({key: forward}, {key: backward + (forward if self.recompute else 0)})

    def _ring(self, width: int) -> Traffic:
        """Count the ring: the rank hands on all keys and values but those of the next place.

        Backward it does so again, and hands on the gradients of all.

        Args:
            width: elements per token of k and v.
        """
        layout = self.layout
        size, place = layout.sp_size // layout.ulysses, layout.sp_rank // layout.ulysses
        if size == 1:
            return Traffic()
        tokens = [0] * size
        for rank in range(layout.sp_size):
            tokens[rank // layout.ulysses] += layout.count(rank)
        passed = (sum(tokens) - tokens[(place + 1) % size]) * width * self.itemsize
        gradients = sum(tokens) * width * max(4, self.itemsize)
        return Traffic({("ring", "ring"): passed}, {("ring", "ring"): passed + gradients})

    def _halo(self, window_size: int, width: int) -> Traffic:
        """Count a halo: forward what others need of the own tokens, backward what came here."""
        layout = self.layout
        if layout.sp_size == 1:
            return Traffic()
        forward, backward = _count_halo(layout, window_size)
        size, key = width * self.itemsize, ("sp", "halo")
        return Traffic({key: forward * size}, {key: backward * size})


def pad_heads(num_heads: int, num_kv_heads: int, num_ranks: int) -> tuple[int, int]:
    """Return how many query heads and how many key heads `num_ranks` compute together.

    Key heads, with zeros if that takes fewest, are as many as divide the ranks or are divided by
    them; ranks that share one have a copy each, and each as many of its query heads.
    """
    group = num_heads // num_kv_heads
    choices = []
    for total in range(num_kv_heads, num_kv_heads + num_ranks):
        if total % num_ranks == 0 or num_ranks % total == 0:
            computed = max(total, num_ranks)
            queries = computed * math.ceil(group * total / computed)
            choices.append((queries + computed, queries, computed))
    return min(choices)[1:]


def expert_traffic(
    demand: Sequence[Sequence[int]],
    rank: int,
    *,
    row_bytes: int,
    passes: int,
    recompute: bool = False,
    copied: Sequence[Sequence[bool]] | None = None,
    expert_bytes: tuple[int, int] = (0, 0),
) -> Traffic:
    """Return what one rank sends for one MoE layer: dispatch to the experts, combine back.

    Args:
        demand: rows of each rank for each expert, in the passes together; the ranks share out the
            experts in order.
        rank: which of them.
        row_bytes: of one row.
        passes: forward passes before which the ranks tell each other how many rows come.
        recompute: the backward pass runs the forward pass again.
        copied: the experts that each rank has a copy of, whose rows stay with it.
        expert_bytes: of the weights of a copy, sent once, and of their gradient, returned once.
    """
    num_ranks = len(demand)
    if num_ranks == 1:
        return Traffic()
    local = len(demand[0]) // num_ranks
    sent = received = lent = borrowed = 0
    for source, rows in enumerate(demand):
        for expert, count in enumerate(rows):
            owner = expert // local
            is_copied = copied is not None and copied[source][expert]
            travels = 0 if is_copied or owner == source else count
            sent += travels * (source == rank)
            received += travels * (owner == rank)
            borrowed += is_copied * (source == rank)
            lent += is_copied * (owner == rank)
    ways = {("ep", "dispatch"): sent * row_bytes, ("ep", "combine"): received * row_bytes}
    forward = {("ep", "counts"): passes * (num_ranks - 1) * local * 8, **ways}
    # Backward each way's gradients go the other way, so that either carries as much as before.
    traffic = Traffic(forward, _add(ways, forward) if recompute else ways)
    if not lent and not borrowed:
        return traffic
    key, (weight_bytes, gradient_bytes) = ("ep", "expert_copy"), expert_bytes
    return traffic + Traffic({key: lent * weight_bytes}, {key: borrowed * gradient_bytes})


def zero_traffic(
    groups: Sequence[Sequence[int]],
    *,
    num_ranks: int,
    zero_stage: int,
    micro_batches: int,
    axis: str = "dp",
) -> Traffic:
    """Return what one rank sends in one optimizer step under ZeRO, in float32.

    Args:
        groups: elements of each parameter, by parameter group.
        num_ranks: over which gradients are summed.
        axis: their name in the ledger.
        micro_batches: of each rank in the step.

    Returns:
        Under `backward` the sum of the gradients, under `forward` the parameters that come back
        once the step is applied; those that ZeRO 3 gathers layer by layer are not in it.
    """
    sizes = [size for group in groups for size in group]
    if num_ranks == 1 or not sizes:
        return Traffic()
    if zero_stage == 3:
        part = sum(-(-size // num_ranks) for size in sizes)
        gradients = micro_batches * (num_ranks - 1) * part * 4
        return Traffic({}, {(axis, "reduce_scatter_tensor"): gradients})
    # ZeRO 2 sums after every micro batch; so that each rank keeps its part alone.
    sums = micro_batches if zero_stage == 2 else 1
    gradients = 2 * (num_ranks - 1) * 4 * sum(sizes) // num_ranks * sums
    parts = [-(-sum(group) // (2 * num_ranks)) * 2 for group in groups] if zero_stage else []
    parameters = {(axis, "all_gather_into_tensor"): (num_ranks - 1) * 4 * sum(parts)}
    return Traffic(parameters if parts else {}, {(axis, "all_reduce"): gradients})


@lru_cache(maxsize=16)
def _count_halo(layout: SequenceLayout, window_size: int) -> tuple[int, int]:
    """Return the tokens that other ranks need of this one, and those that it needs of others."""
    needed = fetched = 0
    for rank, segments in enumerate(layout.segments):
        for segment in segments:
            before = Segment(segment.start - window_size + 1, segment.start)
            halo = before & layout.document(segment.start)
            held = sum(len(halo & mine) for mine in layout.own)
            if rank == layout.sp_rank:
                fetched += len(halo) - held
            else:
                needed += held
    return needed, fetched


def _add(first: Mapping[Key, int], second: Mapping[Key, int]) -> dict[Key, int]:
    return {key: first.get(key, 0) + second.get(key, 0) for key in {**first, **second}}
