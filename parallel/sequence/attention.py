"""Softmax attention over a sequence on several ranks: full by all-to-all and ring, windows by halo.

Either is a sum over blocks of keys, merged by their log-sum-exp: a rank's own, the sinks, the halo
of a window, and what the ring brings.
"""

import torch

from ops.attention import attention as attention_op
from parallel.layout import Segment
from parallel.sequence.all_to_all import gather_heads, plan_heads, scatter_heads
from parallel.sequence.blocks import Block, blocks_between, own_block, window_blocks
from parallel.sequence.context import SequenceContext
from parallel.sequence.halo import fetch_halo
from parallel.sequence.ring import Keys, attend


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    context: SequenceContext,
    *,
    window_size: int | None = None,
) -> torch.Tensor:
    """Causal softmax attention, full or within a window, inside each document.

    Every rank of the sequence axis must call. The first `context.num_sinks` rows are the sinks:
    they see each other, and every token sees them besides what it sees of its document.

    Args:
        q: [1, S + T, H, D], the sinks' rows and this rank's tokens.
        k, v: [1, S + T, H_kv, D].
        window_size: query t sees t - window_size < s <= t (eq. 2 of arXiv:2509.05276).

    Returns:
        [1, S + T, H, D] in the dtype of q.
    """
    outs, sinks = [], None
    if context.num_sinks:
        (q_sinks, q), (k_sinks, k), (v_sinks, v) = (context.split(x) for x in (q, k, v))
        # Copies: what is kept for the backward pass would keep the tokens along with the sinks.
        sinks = (k_sinks.clone(), v_sinks.clone())
        impl = context.ops.attention
        outs.append(attention_op(q_sinks.clone(), *sinks, causal=False, impl=impl)[0])
    if window_size is None:
        outs.append(_full_attention(q, k, v, sinks, context))
    else:
        outs.append(_window_attention(q, k, v, sinks, context, window_size))
    return torch.cat(outs, dim=1) if sinks else outs[0]


def _window_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: tuple[torch.Tensor, torch.Tensor] | None,
    context: SequenceContext,
    window_size: int,
) -> torch.Tensor:
    layout = context.layout
    keys = [Keys(k, v, (own_block(layout),)), *_see_sinks(q, sinks)]
    if layout.sp_size > 1:
        k_halo, v_halo = fetch_halo((k, v), context, window_size)
        keys.append(Keys(k_halo, v_halo, window_blocks(layout, window_size)))
    return attend(q, tuple(keys), layout, context, window_size=window_size)


def _full_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: tuple[torch.Tensor, torch.Tensor] | None,
    context: SequenceContext,
) -> torch.Tensor:
    axis, layout = context.comm.mesh.ulysses, context.layout.ring
    plan = plan_heads(q.shape[2], k.shape[2], axis.size)
    q, k, v = scatter_heads((q, k, v), plan, context)
    if sinks is not None:
        sinks = (plan.select_kv(sinks[0], axis.index), plan.select_kv(sinks[1], axis.index))
    own = (own_block(layout), *blocks_between(layout, layout.sp_rank))
    keys = (Keys(k, v, own), *_see_sinks(q, sinks))
    out = attend(q, keys, layout, context, is_ring=True)
    return gather_heads(out, plan, context)


def _see_sinks(q: torch.Tensor, sinks: tuple[torch.Tensor, torch.Tensor] | None) -> list[Keys]:
    """Return the sinks as keys that every query sees."""
    if sinks is None:
        return []
    k, v = sinks
    rows = Segment(0, q.shape[1]), Segment(0, k.shape[1])
    return [Keys(k, v, (Block(*rows, "full"),))]
