"""The states that enter this rank's segments, from what every segment does to a state.

Over all segments of the sequence in order, with transition A and local state L of each:

    S_in(j) = c_j S_out(j - 1)            S_out(j) = L_j + p_j A_j S_in(j)

c_j = 1 where a document reaches from segment j - 1 into segment j; p_j = 1 where it fills all of
segment j. With G(j) the gradient of S_out(j), the same recurrence runs from the last to the first:

    G(j) = c_(j+1) D(j + 1)               D(j) = dS_in(j) + p_j A_j^T G(j)

and dL_j = G(j), dA_j = p_j G(j) S_in(j)^T.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from parallel.sequence.chain import Chain
from parallel.sequence.context import SequenceContext
from parallel.sequence.state_gather import gather_states
from parallel.sequence.state_scan import scan_states

ALGORITHMS = {"gather": gather_states, "scan": scan_states}


def enter_segments(
    transition: torch.Tensor | None, local: torch.Tensor, context: SequenceContext
) -> torch.Tensor:
    """Return the state that enters each segment; every rank of the sequence axis must call.

    Args:
        transition: [segments, H, D_k or 1, 1] (element by element), [segments, H, D_k, D_k] (a
            matrix) or None (1), of this rank's segments.
        local: [segments, H, D_k, D_v] float32.

    Returns:
        As `local`; zero where no document reaches into the segment.
    """
    states: torch.Tensor = _EnterSegments.apply(context, transition, local)
    return states


class _EnterSegments(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, context: SequenceContext, transition: torch.Tensor | None, local: torch.Tensor
    ) -> torch.Tensor:
        algorithm, chain = ALGORITHMS[context.linear], Chain(context.layout)
        states, *held = context.remember(
            lambda: algorithm(chain, transition, local, (), context.comm)
        )
        ctx.save_for_backward(transition, states, *held)
        ctx.context = context
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dstates: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        transition, states, *held = ctx.saved_tensors
        context = ctx.context
        algorithm, chain = ALGORITHMS[context.linear], Chain(context.layout, is_reverse=True)
        dlocal, *_ = algorithm(chain, transition, dstates, tuple(held), context.comm)
        if transition is None:
            return None, None, dlocal
        if transition.shape[-1] > 1:
            dtransition = dlocal @ states.mT
        else:
            dtransition = (dlocal * states).sum(-1, keepdim=True)
            if transition.shape[-2] == 1:
                dtransition = dtransition.sum(-2, keepdim=True)
        passed = [chain.is_passed(place) for place in reversed(chain.own)]
        mask = torch.tensor(passed, device=dlocal.device).view(-1, 1, 1, 1)
        return None, dtransition.masked_fill(~mask, 0), dlocal
