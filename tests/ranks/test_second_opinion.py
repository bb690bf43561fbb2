"""PyTorch's ring attention and DeepSpeed's Ulysses compute what ours do; nobody sends less.

Bytes are counted where a collective reaches its backend, below all of them. PyTorch's public
`context_parallel` does not run on a CPU (DTensor has no sharding strategy for
`_scaled_dot_product_flash_attention_for_cpu`); the ring inside it does, without grouped heads.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers.assertions import assert_close
from helpers.ranks import Setting, build_context, run_ranks
from torch.utils._python_dispatch import TorchDispatchMode

from parallel.mesh import World
from parallel.sequence import SequenceContext, attention

TOKENS, HEADS, D = 504, 4, 16
Tensors = tuple[torch.Tensor, ...]


class CountSent(TorchDispatchMode):
    """Counts the bytes that this rank sends to others."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.rank, self.size = group.rank(), group.size()
        self.sent = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        library, _, name = func.name().partition("::")
        if library in ("c10d", "_c10d_functional"):
            self.sent += self._count(name, args)
        return func(*args, **kwargs or {})

    def _count(self, name: str, args: tuple[Any, ...]) -> int:
        match name:
            case "send":
                return sum(x.nbytes for x in args[0])
            case "alltoall_base_":
                return self._count_others(args[1], args[4])
            case "all_to_all_single":
                return self._count_others(args[0], args[2])
            case "all_gather_into_tensor":
                return (self.size - 1) * int(args[0].nbytes)
            case "recv_" | "wait_tensor" | "_wrap_tensor_autograd":
                return 0
        raise AssertionError(f"{name} is not counted")

    def _count_others(self, x: torch.Tensor, splits: list[int]) -> int:
        """Return the bytes of all parts of x but the one that stays."""
        stays = splits[self.rank] / sum(splits) if splits else 1 / self.size
        return round(x.nbytes * (1 - stays))


def run_counted(
    world: World, setting: Setting, compute: Callable[..., Tensors], num_kv_heads: int
) -> dict[str, Any]:
    """Return this rank's output and gradients, and the bytes sent: counted, and in the ledger."""
    context = build_context(world, setting, torch.tensor([0, TOKENS], dtype=torch.int32))
    generator = torch.Generator().manual_seed(1)
    inputs = []
    for heads in (HEADS, num_kv_heads, num_kv_heads, HEADS):
        whole = torch.randn(1, TOKENS, heads, D, generator=generator)
        inputs.append(context.layout.shard(whole).requires_grad_())
    group = context.comm.mesh.sp.group
    if group is None:
        results, sent = compute(context, *inputs), 0
    else:
        with CountSent(group) as counter:
            results = compute(context, *inputs)
        sent = counter.sent
    ledger = sum(entry.bytes for entry in context.comm.ledger.entries.values())
    figures = {"sent": sent, "ledger": ledger, "layout": context.layout}
    tensors = (x.detach() for x in results)
    return figures | dict(zip(("out", "dq", "dk", "dv"), tensors, strict=True))


def ours(
    context: SequenceContext,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dout: torch.Tensor,
) -> Tensors:
    out = attention(q, k, v, context)
    return out, *torch.autograd.grad(out, (q, k, v), dout)


def pytorch_gather(context: SequenceContext, *inputs: torch.Tensor) -> Tensors:
    return run_pytorch(context, "ALL_GATHER", inputs)


def pytorch_shift(context: SequenceContext, *inputs: torch.Tensor) -> Tensors:
    return run_pytorch(context, "ALL_TO_ALL", inputs)


def run_pytorch(context: SequenceContext, rotate: str, inputs: Tensors) -> Tensors:
    from torch.distributed.tensor.experimental._context_parallel import _attention as peer

    aten, group = torch.ops.aten, context.comm.mesh.sp.group
    assert group is not None
    forward = aten._scaled_dot_product_flash_attention_for_cpu.default
    backward = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    options: dict[str, Any] = {"is_causal": True, "dropout_p": 0.0, "scale": D**-0.5}
    peer._cp_options.rotate_method = peer._RotateMethod[rotate]
    q, k, v, dout = (x.detach().transpose(1, 2).contiguous() for x in inputs)
    out, lse = peer._templated_ring_attention(group, 2, forward, q, k, v, **options)
    dq, dk, dv = peer._templated_ring_attention_backward(
        group, 2, backward, dout, "grad_out", q, k, v, out, lse, **options
    )
    return tuple(x.transpose(1, 2) for x in (out, dq, dk, dv))


def deepspeed_ulysses(
    context: SequenceContext,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dout: torch.Tensor,
) -> Tensors:
    import deepspeed
    from deepspeed.sequence.layer import DistributedAttention

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2)

    # Otherwise it compiles its own all-reduce.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", verbose=False)
    peer = DistributedAttention(attend, context.comm.mesh.sp.group, scatter_idx=2, gather_idx=1)
    out = peer(q, k, v, 0)
    return out, *torch.autograd.grad(out, (q, k, v), dout)


@pytest.mark.parametrize(
    ("peer", "setting", "num_kv_heads"),
    [
        (pytorch_gather, Setting(1, 4, "zigzag"), 4),
        (pytorch_shift, Setting(1, 3, "zigzag"), 4),
        (deepspeed_ulysses, Setting(2), 2),
    ],
    ids=lambda value: getattr(value, "id", None) or getattr(value, "__name__", None),
)
def test_a_peer_agrees_and_sends_no_less(
    peer: Callable[..., Tensors], setting: Setting, num_kv_heads: int
) -> None:
    one = run_counted(World(0, 1, 0), Setting(), ours, num_kv_heads)
    mine = run_ranks(setting.num_ranks, run_counted, setting, ours, num_kv_heads)
    theirs = run_ranks(setting.num_ranks, run_counted, setting, peer, num_kv_heads)
    for results in (mine, theirs):
        for name in ("out", "dq", "dk", "dv"):
            whole = mine[0]["layout"].restore([rank[name] for rank in results])
            assert_close(name, whole, one[name], torch.float32)
    for our, their in zip(mine, theirs, strict=True):
        assert our["sent"] == our["ledger"]
        assert 0 < our["sent"] <= their["sent"]
