"""ZeCO's All-Scan (arXiv:2507.01004): the state is handed on from segment to segment, cut into
blocks of columns so that a rank sends one block while it receives the next.

Sent by a rank: one state for each of its segments, whatever the number of ranks; transitions stay
where they are.
"""

import torch

from parallel.comm import Comm
from parallel.sequence.chain import Chain

BLOCK_BYTES = 65536
"""Smaller blocks cost more in latency than they hide."""


def scan_states(
    chain: Chain,
    transition: torch.Tensor | None,
    added: torch.Tensor,
    held: tuple[torch.Tensor, ...],
    comm: Comm,
) -> tuple[torch.Tensor, ...]:
    """Return what enters this rank's segments; arguments as `gather_states`, nothing is held."""
    own = chain.layout.sp_rank
    ranks = [rank for rank, _ in chain.order]
    blocks = _columns(added[0])
    results = torch.empty_like(added)
    last: list[torch.Tensor] = []
    for place in chain.own:
        index = chain.order[place][1]
        source = ranks[place - 1] if place else own
        target = ranks[place + 1] if place + 1 < len(ranks) else own
        left: list[torch.Tensor] = []
        # In step i block i comes in and block i - 1 goes out.
        for i in range(len(blocks) + 1):
            sends, receives = {}, {}
            if i > 0 and target != own:
                sends[target] = left[i - 1]
            if i < len(blocks):
                block = added[index, :, :, blocks[i]]
                before = torch.zeros_like(block, memory_format=torch.contiguous_format)
                if source != own:
                    receives[source] = before
                elif last:
                    before = last[i]
            if sends or receives:
                part = f"step {i + 1} of {len(blocks) + 1}"
                comm.exchange("state_scan", sends, receives, comm.mesh.sp, part).wait()
            if i < len(blocks):
                entered = chain.enter(place, before)
                one = None if transition is None else transition[index]
                results[index, :, :, blocks[i]] = entered
                left.append(chain.leave(place, one, block, entered).contiguous())
        last = left
    comm.settle(comm.mesh.sp)
    return (results,)


def _columns(state: torch.Tensor) -> list[slice]:
    """Cut the columns of a state [H, D_k, D_v], which no transition mixes, into even blocks."""
    width = state.shape[2]
    count = max(1, min(width, state.numel() * state.element_size() // BLOCK_BYTES))
    return [slice(width * i // count, width * (i + 1) // count) for i in range(count)]
