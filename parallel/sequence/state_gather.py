"""LASP-2 (arXiv:2502.07563): every rank gathers what all segments do to a state, in one collective,
and computes the states that enter its own.

Sent by a rank: (P - 1) times its segments' transitions and local states forward, and (P - 1) times
the gradients of their states backward, where the transitions are at hand.
"""

import torch

from parallel.comm import Comm
from parallel.sequence.chain import Chain


def gather_states(
    chain: Chain,
    transition: torch.Tensor | None,
    added: torch.Tensor,
    held: tuple[torch.Tensor, ...],
    comm: Comm,
) -> tuple[torch.Tensor, ...]:
    """Return what enters this rank's segments, and the transitions of all, to hold for backward.

    Args:
        transition: [segments, H, D_k or 1, 1 or D_k] or None, of this rank.
        added: [segments, H, D_k, D_v], what each segment adds.
        held: the transitions of all ranks if they are known, [P, segments, ...].
    """
    layout = chain.layout
    most = max(len(segments) for segments in layout.segments)
    parts = [added] if transition is None or held else [added, transition]
    payload = torch.cat([part.flatten(1) for part in parts], dim=1)
    payload = torch.nn.functional.pad(payload, (0, 0, 0, most - len(payload)))
    gathered = comm.all_gather(payload, comm.mesh.sp)
    comm.settle(comm.mesh.sp)
    size = added[0].numel()
    all_added = gathered[..., :size].unflatten(2, added.shape[1:])
    if transition is not None and not held:
        held = (gathered[..., size:].unflatten(2, transition.shape[1:]).clone(),)

    results: dict[int, torch.Tensor] = {}
    leaving = torch.zeros_like(added[0])
    for place, (rank, index) in enumerate(chain.order[: chain.own[-1] + 1]):
        entered = chain.enter(place, leaving)
        if rank == layout.sp_rank:
            results[index] = entered
        one = held[0][rank, index] if held else None
        leaving = chain.leave(place, one, all_added[rank, index], entered)
    return torch.stack([results[index] for index in sorted(results)]), *held
