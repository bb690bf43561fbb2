"""Token mixing over a sequence that may be spread over ranks.

A mixer calls these with its context and never asks how many ranks there are. With one rank of the
sequence axis each is the operator itself on the layout's documents.
"""

from dataclasses import dataclass, field

import torch

from conf.schema import OpsConfig
from ops.attention import attention as attention_op
from ops.linear_attention import linear_attention as linear_attention_op
from ops.rotary import rotary_table
from parallel.layout import SequenceLayout
from parallel.mesh import Mesh


@dataclass(frozen=True)
class SequenceContext:
    """What a mixer is handed: the ranks, who holds which tokens, and the operators' pins."""

    mesh: Mesh
    layout: SequenceLayout
    ops: OpsConfig
    _tables: dict[tuple[int, float], tuple[torch.Tensor, torch.Tensor]] = field(
        default_factory=dict, compare=False
    )

    def rotary_table(self, head_dim: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cos and sin, [T, head_dim / 2], of this rank's positions; made once."""
        key = (head_dim, theta)
        if key not in self._tables:
            self._tables[key] = rotary_table(self.layout.position_ids(), head_dim, theta)
        return self._tables[key]


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    context: SequenceContext,
    *,
    window_size: int | None = None,
) -> torch.Tensor:
    """Causal softmax attention, full or within a window, inside each document.

    Args:
        q: [1, T, H, D], this rank's tokens.
        k, v: [1, T, H_kv, D].
        window_size: query t sees t - window_size < s <= t (eq. 2 of arXiv:2509.05276).

    Returns:
        [1, T, H, D] in the dtype of q.
    """
    out, _ = attention_op(
        q,
        k,
        v,
        window_size=window_size,
        cu_seqlens=context.layout.cu_seqlens,
        impl=context.ops.attention,
    )
    return out


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

    Args:
        q: [1, T, H, D_k], this rank's tokens.
        k, v, log_decay: [1, T, H_state, D], H_state divides H.

    Returns:
        out [1, T, H, D_v] and, if asked for, the state [N, H_state, D_k, D_v] after each document.
    """
    out, state = linear_attention_op(
        q,
        k,
        v,
        log_decay,
        cu_seqlens=context.layout.cu_seqlens,
        output_final_state=output_final_state,
        impl=context.ops.linear_attention,
    )
    return out, state
