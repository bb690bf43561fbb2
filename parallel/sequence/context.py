"""What a mixer is handed: who holds which tokens, the operators' pins, and the collectives."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch

from conf.schema import OpsConfig, RopeScaling
from ops.rotary import rotary_table
from parallel.comm import Comm
from parallel.hot_experts import HotExperts
from parallel.layout import SequenceLayout
from parallel.recompute import Memory


@dataclass(frozen=True)
class SequenceContext:
    """A mixer passes it on to the functions of this package and reads no more than rotary tables
    and, to fill a cache, the number of sinks.

    Attributes:
        layout: the tokens of this rank.
        ops: pins of implementations.
        comm: collectives on behalf of the layer that computes.
        linear: how the states of linear attention reach the next ranks.
        num_sinks: rows before the tokens that hold the sink tokens, the same ones on every rank.
        memory: keeps what communication brought for a recomputed forward pass.
        aux_loss_scale: weight of the auxiliary losses of one token in what is differentiated.
        hot_experts: counts the rows of routed experts, and has copies of some.
    """

    layout: SequenceLayout
    ops: OpsConfig
    comm: Comm = field(default_factory=Comm)
    linear: Literal["gather", "scan"] = "gather"
    num_sinks: int = 0
    memory: Memory | None = None
    aux_loss_scale: float = 0.0
    hot_experts: HotExperts = field(default_factory=HotExperts, compare=False)
    _tables: dict[tuple[int, int, float, RopeScaling | None], tuple[torch.Tensor, torch.Tensor]] = (
        field(default_factory=dict, compare=False)
    )

    def at(self, *, layer: str | None = None, kind: str | None = None) -> "SequenceContext":
        """Return the context for a layer, or for a kind of mixer in it."""
        return dataclasses.replace(self, comm=self.comm.at(layer=layer, kind=kind))

    def remembering(self) -> "SequenceContext":
        """Return the context for a part of the model that will run again in the backward pass."""
        return dataclasses.replace(self, memory=Memory())

    def split(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the rows of the sinks and those of the tokens, from x [1, S + T, ...]."""
        return x[:, : self.num_sinks], x[:, self.num_sinks :]

    def remember(self, compute: Callable[[], tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
        """Return compute(), or what it returned when this forward pass ran the first time."""
        return compute() if self.memory is None else self.memory.remember(compute)

    def rotary_table(
        self, head_dim: int, theta: float, scaling: RopeScaling | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cos and sin, [rows, head_dim / 2], of this rank's positions; made once.

        Sinks stand before the first token of every document.
        """
        key = (self.num_sinks, head_dim, theta, scaling)
        if key not in self._tables:
            sinks = torch.arange(self.num_sinks)
            positions = torch.cat([sinks, self.layout.position_ids() + self.num_sinks])
            positions = positions.to(self.comm.mesh.device)
            self._tables[key] = rotary_table(positions, head_dim, theta, scaling)
        return self._tables[key]
