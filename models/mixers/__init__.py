"""Token mixers, one file each; the file holds the mixer's config class and its module."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import nn

from conf.schema import OpsConfig, RopeScaling, SpikeConfig
from models.cache import MixerCache
from parallel.cost import SequenceCost, Traffic
from parallel.sequence import SequenceContext


class MixerConfig(Protocol):
    """What a mixer's config offers; each is a strict frozen dataclass in its own file."""

    def build(
        self, hidden_size: int, norm_eps: float, spike: SpikeConfig, ops: OpsConfig
    ) -> "Mixer":
        """Make the module."""
        ...


def check_heads(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    rope_theta: float | None,
    rope_scaling: RopeScaling | None,
) -> None:
    """Raise ValueError unless heads share keys and values evenly and can be rotated."""
    if num_heads % num_kv_heads:
        raise ValueError(
            f"num_kv_heads={num_kv_heads} must divide num_heads={num_heads}; "
            f"num_kv_heads=1 and {num_heads} do"
        )
    if rope_theta is not None and head_dim % 2:
        raise ValueError(f"head_dim={head_dim} must be even for rotary embedding")
    if rope_scaling is not None and rope_theta is None:
        raise ValueError("rope_theta=null leaves nothing to scale; set rope_scaling=null too")


class Mixer(nn.Module, ABC):
    """Mixes tokens of `[1, T, E]` within each document of the context's layout."""

    kind: str
    """Name in reports: linear_attention, window_attention, full_attention ..."""

    @abstractmethod
    def forward(
        self, x: torch.Tensor, context: SequenceContext, cache: MixerCache | None = None
    ) -> torch.Tensor:
        """Mix this rank's tokens.

        Args:
            x: [1, T, E] normalised hidden states.
            cache: an empty cache to fill with what decoding needs of one document (a prompt).
        """

    @abstractmethod
    def decode(self, x: torch.Tensor, cache: MixerCache, position: int) -> torch.Tensor:
        """Mix one token `x` [B, 1, E] with what `cache` holds, and add it there.

        Args:
            position: of the token in its document; sinks before it count.
        """

    @abstractmethod
    def new_cache(self) -> MixerCache:
        """Return an empty cache."""

    @abstractmethod
    def reset(self, std: float, out_std: float) -> None:
        """Draw initial weights; `out_std` for the projection that writes to the residual."""

    def reset_additions(self, std: float, last_std: float) -> None:
        """Draw the weights of what softmax attention does not have, all but norms.

        Args:
            last_std: for the last projection of a gate; at 0 its bias alone speaks at first.
        """

    @abstractmethod
    def mixing_flops(self, doc_lengths: Sequence[int], num_sinks: int = 0) -> float:
        """Return the forward FLOPs beyond the projections (section 5 of the FLOP definition).

        Args:
            doc_lengths: tokens of each document.
            num_sinks: sinks before each document; what the tokens spend on them counts.
        """

    @abstractmethod
    def extra_flops(self, doc_lengths: Sequence[int], num_sinks: int = 0) -> tuple[float, float]:
        """Return what the kernels spend beyond `mixing_flops`, in forward and in backward.

        The backward pass of the model itself is 2 x forward.
        """

    @abstractmethod
    def traffic(self, cost: SequenceCost) -> Traffic:
        """Return what this rank sends in a forward and a backward pass over a micro batch."""
