"""How many rows each rank has had for each expert: what copies of experts and bytes follow from."""

import torch
from torch import nn

from models.causal_lm import CausalLM
from models.moe import Router
from parallel.comm import Comm


class ExpertDemand:
    """Counts the rows of this part of a model, those of sinks included, before any is sent.

    Args:
        model: the part of the model that this rank has.
        comm: collectives of this rank.
    """

    def __init__(self, model: CausalLM, comm: Comm) -> None:
        self._routers = [module for module in model.modules() if isinstance(module, Router)]
        self._comm = comm.at(kind="demand")

    def take(self) -> torch.Tensor | None:
        """Return int64 [P, MoE layers, num_experts] on the CPU, rows since the last call.

        Every rank of the axis ep must call, and has the same afterwards. Where layers differ in
        num_experts, the rest is 0. None where one rank has all experts.
        """
        rows = [router.take_demand() for router in self._routers]
        axis = self._comm.mesh.ep
        if axis.size == 1 or not rows:
            return None
        padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return self._comm.all_gather(padded, axis).cpu()
