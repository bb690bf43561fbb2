"""Linear attention and the delta rule over a sequence on several ranks.

A segment turns the state that enters it into transition * state + local: `local` is where it ends
from a state of zero, the transition its decay (absent, one per head or per channel) or, for the
delta rule, a dense matrix. Once a rank knows the states that enter its segments (`state_gather`,
`state_scan`), the operator does the rest (section 3 of arXiv:2502.07563, with decay).
"""

from collections.abc import Callable
from functools import partial

import torch

from ops.delta_rule import delta_rule as delta_rule_op
from ops.linear_attention import linear_attention as linear_attention_op
from parallel.layout import Segment, SequenceLayout
from parallel.recompute import run_recomputed
from parallel.sequence.chain import transform
from parallel.sequence.context import SequenceContext
from parallel.sequence.end_state import end_state
from parallel.sequence.states import enter_segments

Inputs = dict[str, torch.Tensor]
"""Arguments of an operator by name, [1, rows, ...] each; without decay there is no log_decay."""
Operator = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]
Summarize = Callable[[Operator, Inputs], tuple[torch.Tensor, torch.Tensor | None]]
"""Returns where the inputs end from a state of zero [H_state, D_k, D_v] and their transition: None,
[H_state, D_k or 1, 1] or [H_state, D_k, D_k]; float32."""


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
    inputs = {"q": q, "k": k, "v": v} | _optional(log_decay)
    op = partial(linear_attention_op, impl=context.ops.linear_attention)
    return _mix(op, inputs, _summarize_decay, context, output_final_state)


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
    inputs = {"q": q, "k": k, "v": v, "beta": beta} | _optional(log_decay)
    op = partial(delta_rule_op, impl=context.ops.delta_rule)
    return _mix(op, inputs, _summarize_corrections, context, output_final_state)


def _mix(
    op: Operator,
    inputs: Inputs,
    summarize: Summarize,
    context: SequenceContext,
    output_final_state: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Run the operator over the sinks, then over the tokens from the states that enter them."""
    outs, begin = [], None
    if context.num_sinks:
        split = {name: context.split(x) for name, x in inputs.items()}
        out, begin = op(**{name: x for name, (x, _) in split.items()}, output_final_state=True)
        outs.append(out)
        inputs = {name: x for name, (_, x) in split.items()}
    layout = context.layout
    initial = None if begin is None else begin.expand(len(layout.cu_seqlens) - 1, -1, -1, -1)
    if layout.sp_size > 1:
        initial = _enter_pieces(op, inputs, summarize, begin, context)
    out, state = op(
        **inputs,
        initial_state=initial,
        cu_seqlens=layout.cu_seqlens,
        output_final_state=output_final_state,
    )
    return torch.cat([*outs, out], dim=1) if outs else out, state


def _enter_pieces(
    op: Operator,
    inputs: Inputs,
    summarize: Summarize,
    begin: torch.Tensor | None,
    context: SequenceContext,
) -> torch.Tensor:
    """Return the state that enters each piece, [N, H_state, D_k, D_v].

    Args:
        begin: [1, H_state, D_k, D_v], the state that a document begins with; None: zero.
    """
    layout = context.layout
    ends, transitions = [], []
    # The last piece of a segment alone reaches the next segment.
    for rows, begins in _last_pieces(layout):
        end, transition = summarize(op, {name: x[:, rows.rows] for name, x in inputs.items()})
        if begin is not None:
            # Times 0 elsewhere: the states must depend on the same tensors on every rank, or some
            # would not take part in the collective of the backward pass.
            end = end + begins * transform(transition, begin[0])
        ends.append(end)
        transitions += [] if transition is None else [transition]
    entering = enter_segments(
        torch.stack(transitions) if transitions else None, torch.stack(ends), context
    )
    first = torch.zeros_like(entering[0]) if begin is None else begin[0]
    states = []
    for pieces, state in zip(layout.pieces, entering, strict=True):
        continues = layout.document(pieces[0].start).start < pieces[0].start
        # A state of zero is added all the same: a rank whose states nothing depends on would not
        # take part in the collective of the backward pass.
        states += [state if continues else state + first, *[first] * (len(pieces) - 1)]
    return torch.stack(states)


def _summarize_decay(op: Operator, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor | None]:
    return end_state(inputs["k"], inputs["v"], inputs.get("log_decay"))


def _summarize_corrections(op: Operator, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the rule, which is linear in its state and its values, with further values of zero.

    Their columns take the identity to the transition, beside those that end at the local state.
    """
    k, v = inputs["k"], inputs["v"]
    H, D_k, D_v = *k.shape[2:], v.shape[3]
    wide = torch.promote_types(k.dtype, torch.float32)
    start = torch.eye(D_k, dtype=wide, device=k.device).expand(1, H, D_k, D_k)
    start = torch.cat([start.new_zeros(1, H, D_k, D_v), start], dim=3)
    # What the operator keeps for the backward pass would be most of what it keeps for the outputs,
    # once more.
    final = run_recomputed(_end_of_columns, start, op, inputs)
    end, transition = final[0].split([D_v, D_k], dim=2)
    return end, transition


def _end_of_columns(start: torch.Tensor, op: Operator, inputs: Inputs) -> torch.Tensor:
    """Return the state after the inputs, with zeros for the values that end at the transition."""
    k, v = inputs["k"], inputs["v"]
    inputs = inputs | {"q": k, "v": torch.cat([v, torch.zeros_like(k)], dim=3)}
    _, final = op(**inputs, initial_state=start, output_final_state=True)
    assert final is not None, "it was asked for"
    return final


def _last_pieces(layout: SequenceLayout) -> list[tuple[Segment, bool]]:
    """Return the rows of the last piece of each segment and whether a document begins with it."""
    result, offset = [], 0
    for segment in layout.pieces:
        last = segment[-1]
        rows = last.shift(offset - segment[0].start)
        result.append((rows, layout.document(last.start).start == last.start))
        offset = rows.stop
    return result


def _optional(log_decay: torch.Tensor | None) -> Inputs:
    return {} if log_decay is None else {"log_decay": log_decay}
