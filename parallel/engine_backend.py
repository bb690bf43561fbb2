"""DeepSpeed's communication by our groups, into our ledger.

DeepSpeed makes process groups of its own, over ranks that have one already and with a timeout of
half an hour, and logs sizes without saying which ranks took part. It talks to PyTorch through one
object, whose place this one takes.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import deepspeed
import deepspeed.comm
import torch.distributed as dist

from parallel.ledger import Ledger
from parallel.mesh import Mesh

_COLLECTIVES = {
    "all_reduce": ("tensor", "op", "group"),
    "all_gather_into_tensor": ("output_tensor", "input_tensor", "group"),
    "all_gather": ("tensor_list", "tensor", "group"),
    "reduce_scatter_tensor": ("output_tensor", "input_tensor", "op", "group"),
    "reduce": ("tensor", "dst", "op", "group"),
    "broadcast": ("tensor", "src", "group"),
    "send": ("tensor", "dst", "group"),
}
"""Names of their arguments, in order."""
_LARGEST_SCALARS = 8
"""Bytes of what is no gradient and no parameter, but a norm or a flag; integers are none either."""


class Backend:
    """Stands in for DeepSpeed's backend object: what it does not have is that one's.

    Attributes:
        purpose: name of the axis in the ledger, where it is not that of the ranks: "start", until
            an engine stands, so that no step counts what came before the first, or "checkpoint".
    """

    def __init__(self, mesh: Mesh, ledger: Ledger) -> None:
        given = deepspeed.comm.comm.cdb
        self._backend: Any = given._backend if isinstance(given, Backend) else given
        self._mesh, self._ledger = mesh, ledger
        self.purpose: str | None = "start"
        # Where two axes have the same ranks, the later one names them.
        axes = (mesh.world, mesh.edp, mesh.stage, mesh.pp, mesh.ends)
        self._names = {axis.ranks: axis.name for axis in axes}
        for name in _COLLECTIVES:
            setattr(self, name, self._recorded(name))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def new_group(self, ranks: Sequence[int]) -> dist.ProcessGroup | None:
        """Return the group over these ranks, the one that is there if there is one."""
        assert self._mesh.groups is not None, "DeepSpeed runs on a mesh of `init_mesh`"
        return self._mesh.groups.get(ranks)

    def _recorded(self, name: str) -> Callable[..., Any]:
        function = getattr(self._backend, name)

        def collective(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = function(*args, **kwargs)
            given = dict(zip(_COLLECTIVES[name], args, strict=False)) | kwargs
            self._record(name, given, time.perf_counter() - start)
            return result

        return collective

    def _record(self, name: str, given: dict[str, Any], seconds: float) -> None:
        tensor = given["input_tensor" if "input_tensor" in given else "tensor"]
        num_bytes = tensor.numel() * tensor.element_size()
        is_scalar = num_bytes <= _LARGEST_SCALARS or not tensor.is_floating_point()
        if name == "send":
            axis = "pp"
            kind = "activations" if given["dst"] > self._mesh.rank else "gradients"
        else:
            ranks = tuple(dist.get_process_group_ranks(given.get("group") or dist.group.WORLD))
            if len(ranks) == 1:
                return
            num_bytes = _bytes_sent(name, num_bytes, len(ranks))
            axis = self._names.get(ranks, "world")
            kind = "gradients" if "reduce" in name else "parameters"
        kind = "scalars" if is_scalar else kind
        if self.purpose is not None:
            axis, kind = self.purpose, ""
        self._ledger.record(axis, name, num_bytes, seconds, kind=kind)


def install_backend(mesh: Mesh, ledger: Ledger) -> Backend:
    """Make DeepSpeed communicate by the groups of `mesh` and enter it into `ledger`."""
    deepspeed.init_distributed(verbose=False)
    backend = Backend(mesh, ledger)
    deepspeed.comm.comm.cdb = backend
    return backend


def _bytes_sent(name: str, num_bytes: int, size: int) -> int:
    """Return the bytes a rank sends of its own `num_bytes`, by rings over `size` ranks."""
    if name == "all_reduce":
        return 2 * (size - 1) * num_bytes // size
    if name in ("broadcast", "reduce"):
        return num_bytes // size  # one of `size` ranks sends it
    if name.startswith("all_gather"):
        return (size - 1) * num_bytes
    return (size - 1) * num_bytes // size
