"""Collectives of our own; each call enters the ledger. DeepSpeed's are absorbed by `engine`."""

import time

import torch
import torch.distributed as dist

from parallel.ledger import Ledger
from parallel.mesh import Mesh


def all_reduce_sum(x: torch.Tensor, mesh: Mesh, ledger: Ledger, axis: str = "dp") -> torch.Tensor:
    """Return the sum of `x` over the ranks of `axis`; every rank of it must call.

    A ring all-reduce sends 2 (P - 1) / P of the tensor from each rank.
    """
    if mesh.world_size == 1:
        return x
    x = x.clone()
    start = time.perf_counter()
    dist.all_reduce(x)
    num_bytes = 2 * (mesh.world_size - 1) * x.numel() * x.element_size() // mesh.world_size
    ledger.record(axis, "all_reduce", num_bytes, time.perf_counter() - start)
    return x


def broadcast_object(value: str | None, mesh: Mesh) -> str | None:
    """Return rank 0's `value` on every rank; every rank must call."""
    if mesh.world_size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
