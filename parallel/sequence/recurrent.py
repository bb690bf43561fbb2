"""Linear attention and the delta rule over a sequence on several ranks.

A segment turns the state that enters it into transition * state + local: `local` is where it ends
from a state of zero, the transition its decay (absent, one per head or per channel) or, for the
delta rule, a dense matrix. Once a rank knows the states that enter its segments (`state_gather`,
`state_scan`), the operator does the rest (section 3 of arXiv:2502.07563, with decay).
"""

from typing import NamedTuple

import torch

from ops.delta_rule import delta_rule as delta_rule_op
from ops.linear_attention import linear_attention as linear_attention_op
from parallel.layout import Segment, SequenceLayout
from parallel.sequence.context import SequenceContext
from parallel.sequence.end_state import end_state
from parallel.sequence.states import enter_segments


class Summary(NamedTuple):
    """What this rank's segments do to a state; each is a row."""

    transition: torch.Tensor | None
    """[segments, H_state, D_k or 1, 1], or [segments, H_state, D_k, D_k], float32; None: 1."""
    local: torch.Tensor
    """[segments, H_state, D_k, D_v] float32."""


def linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor | None,
    context: SequenceContext,
    *,
    output_final_state: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gated linear attention inside each document (eq. 10 of arXiv:2509.05276).

    Every rank of the sequence axis must call. Every document begins with the state that the sinks,
    the first `context.num_sinks` rows, leave behind.

    Args:
        q: [1, S + T, H, D_k], the sinks' rows and this rank's tokens.
        k, v: [1, S + T, H_state, D]; H_state divides H.
        log_decay: None, [1, S + T, H_state] or [1, S + T, H_state, D_k].
        output_final_state: also return the states; only where one rank holds all tokens.

    Returns:
        out [1, S + T, H, D_v] and, if asked for, the state [N, H_state, D_k, D_v] after each
        document.
    """
    impl, out_sinks, begin = context.ops.linear_attention, None, None
    if context.num_sinks:
        sizes = [context.num_sinks, q.shape[1] - context.num_sinks]
        (q_sinks, q), (k_sinks, k), (v_sinks, v) = (x.split(sizes, dim=1) for x in (q, k, v))
        decay_sinks = None
        if log_decay is not None:
            decay_sinks, log_decay = log_decay.split(sizes, dim=1)
        out_sinks, begin = linear_attention_op(
            q_sinks, k_sinks, v_sinks, decay_sinks, output_final_state=True, impl=impl
        )
    initial = _initial_states(_summarize_decay(k, v, log_decay, begin, context), begin, context)
    out, state = linear_attention_op(
        q,
        k,
        v,
        log_decay,
        initial_state=initial,
        cu_seqlens=context.layout.cu_seqlens,
        output_final_state=output_final_state,
        impl=impl,
    )
    return out if out_sinks is None else torch.cat([out_sinks, out], dim=1), state


def delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    log_decay: torch.Tensor | None,
    context: SequenceContext,
    *,
    output_final_state: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The delta rule, plain or gated, inside each document; as `linear_attention`.

    Args:
        beta: [1, S + T, H_state].
    """
    impl, out_sinks, begin = context.ops.delta_rule, None, None
    if context.num_sinks:
        sizes = [context.num_sinks, q.shape[1] - context.num_sinks]
        (q_sinks, q), (k_sinks, k), (v_sinks, v) = (x.split(sizes, dim=1) for x in (q, k, v))
        beta_sinks, beta = beta.split(sizes, dim=1)
        decay_sinks = None
        if log_decay is not None:
            decay_sinks, log_decay = log_decay.split(sizes, dim=1)
        out_sinks, begin = delta_rule_op(
            q_sinks, k_sinks, v_sinks, beta_sinks, decay_sinks, output_final_state=True, impl=impl
        )
    summary = _summarize_corrections(k, v, beta, log_decay, begin, context)
    out, state = delta_rule_op(
        q,
        k,
        v,
        beta,
        log_decay,
        initial_state=_initial_states(summary, begin, context),
        cu_seqlens=context.layout.cu_seqlens,
        output_final_state=output_final_state,
        impl=impl,
    )
    return out if out_sinks is None else torch.cat([out_sinks, out], dim=1), state


def _summarize_decay(
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor | None,
    begin: torch.Tensor | None,
    context: SequenceContext,
) -> Summary | None:
    """Summarize the last piece of each segment, which alone reaches the next segment."""
    layout = context.layout
    if layout.sp_size == 1:
        return None
    locals_, transitions = [], []
    for rows, begins in _last_pieces(layout):
        decay = None if log_decay is None else log_decay[:, rows.rows]
        local, total = end_state(k[:, rows.rows], v[:, rows.rows], decay)
        if begins and begin is not None:
            local = local + (begin[0] if total is None else total * begin[0])
        locals_.append(local)
        transitions += [] if total is None else [total]
    return Summary(torch.stack(transitions) if transitions else None, torch.stack(locals_))


def _summarize_corrections(
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    log_decay: torch.Tensor | None,
    begin: torch.Tensor | None,
    context: SequenceContext,
) -> Summary | None:
    """Summarize as `_summarize_decay`.

    The rule is linear in its state and its values: with values of zero it takes the identity to the
    transition, beside the values that take zero to the local state.
    """
    layout = context.layout
    if layout.sp_size == 1:
        return None
    H, D_k, D_v = *k.shape[2:], v.shape[3]
    start = torch.eye(D_k, dtype=torch.float32, device=k.device).expand(1, H, D_k, D_k)
    start = torch.cat([start.new_zeros(1, H, D_k, D_v), start], dim=3)
    locals_, transitions = [], []
    for rows, begins in _last_pieces(layout):
        keys, values, strength = (x[:, rows.rows] for x in (k, v, beta))
        _, end = delta_rule_op(
            keys,
            keys,
            torch.cat([values, torch.zeros_like(keys)], dim=3),
            strength,
            None if log_decay is None else log_decay[:, rows.rows],
            initial_state=start,
            output_final_state=True,
            impl=context.ops.delta_rule,
        )
        assert end is not None, "the final state was asked for"
        local, transition = end[0].split([D_v, D_k], dim=2)
        if begins and begin is not None:
            local = local + transition @ begin[0]
        locals_.append(local)
        transitions.append(transition)
    return Summary(torch.stack(transitions), torch.stack(locals_))


def _initial_states(
    summary: Summary | None, begin: torch.Tensor | None, context: SequenceContext
) -> torch.Tensor | None:
    """Return the state that enters each piece, [N, H_state, D_k, D_v]; None: zeros.

    Args:
        begin: [1, H_state, D_k, D_v], the state that a document begins with; None: zero.
    """
    pieces = context.layout.pieces
    if summary is None:
        return None if begin is None else begin.expand(sum(map(len, pieces)), -1, -1, -1)
    entering = enter_segments(summary.transition, summary.local, context)
    first = torch.zeros_like(entering[0]) if begin is None else begin[0]
    states = []
    for segment, state in zip(pieces, entering, strict=True):
        continues = context.layout.document(segment[0].start).start < segment[0].start
        # A state of zero is added all the same: a rank whose states nothing depends on would not
        # take part in the collective of the backward pass.
        states += [state if continues else state + first, *[first] * (len(segment) - 1)]
    return torch.stack(states)


def _last_pieces(layout: SequenceLayout) -> list[tuple[Segment, bool]]:
    """Return the rows of the last piece of each segment and whether a document begins with it."""
    result, offset = [], 0
    for segment in layout.pieces:
        last = segment[-1]
        rows = last.shift(offset - segment[0].start)
        result.append((rows, layout.document(last.start).start == last.start))
        offset = rows.stop
    return result
