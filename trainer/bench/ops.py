"""`suite=ops`: what the registry chose for every operator, then each beside PyTorch's own.

Times are of forward and backward together, sides in turn, medians. A peer of quadratic cost is
timed up to `max_peer_seq_len`.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from conf.schema import BenchConfig
from ops.attention import attention
from ops.catalog import OPERATORS
from ops.cross_entropy import linear_cross_entropy
from ops.delta_rule import delta_rule
from ops.int8_linear import int8_linear
from ops.linear_attention import linear_attention
from ops.moe import grouped_matmul
from ops.registry import explain
from ops.rms_norm import rms_norm
from ops.rotary import rotary, rotary_table
from ops.short_conv import short_conv
from ops.spike import spike_count, spike_matmul
from ops.swiglu import swiglu
from trainer.accelerator import Accelerator
from trainer.bench.memory import peak_allocated_bytes
from trainer.bench.rows import Row, median_seconds

Compute = Callable[[], object]


def bench_ops(config: BenchConfig, accelerator: Accelerator, peak: float) -> Iterator[Row]:
    """Yield the rows of `config.operators`, all if it is empty."""
    bench = OpBench(
        accelerator.device(0),
        getattr(torch, config.dtype),
        config.repeats,
        config.max_peer_seq_len,
        accelerator.synchronize,
    )
    for op, table in OPERATORS.items():
        name, why = explain(op, table, bench.device.type, bench.dtype)
        print(f"ops.{op:18s} {name:10s} {why}")
    for op, suite in SUITES.items():
        if not config.operators or op in config.operators:
            yield from suite(bench)


@dataclass(frozen=True)
class OpBench:
    """Where and how the operators are measured."""

    device: torch.device
    dtype: torch.dtype
    repeats: int
    max_peer_seq_len: int
    synchronize: Callable[[], None]

    def draw(self, *shape: int, grad: bool = True) -> torch.Tensor:
        """Return normal numbers."""
        x = torch.randn(shape, device=self.device).to(self.dtype)
        return x.requires_grad_(grad)

    def seconds(self, *sides: Compute) -> list[float]:
        """Return the median time of each side, in turn."""
        return median_seconds(sides, self.repeats, self.synchronize)

    def compare(self, case: str, ours: Compute, peer: Compute | None, peer_name: str) -> Row:
        """Return the row of two sides' times; without a peer that of ours."""
        if peer is None:
            return Row(case, "seconds", self.seconds(ours)[0], "s")
        mine, other = self.seconds(ours, peer)
        return Row(case, "seconds", mine, "s", peer_name, other, other / mine)

    def peak_bytes(self, compute: Compute) -> int:
        """Return the most memory that a computation allocates beyond its inputs."""
        compute()
        return peak_allocated_bytes(compute, self.device)


def _step(
    function: Callable[..., torch.Tensor], leaves: Sequence[torch.Tensor], dout: torch.Tensor
) -> Compute:
    """Return a function that computes forward and the gradients of the leaves."""

    def step() -> None:
        torch.autograd.grad(function(*leaves), leaves, dout)

    return step


def _bench_linear_attention(bench: OpBench) -> Iterator[Row]:
    steps: dict[int, Compute] = {}
    for T in (4096, 16384, 65536):
        q, k, v, dout = (bench.draw(1, T, 8, 64) for _ in range(4))
        log_decay = -0.1 * torch.rand(1, T, 8, 64, device=bench.device)
        leaves = [q, k, v, log_decay.requires_grad_()]
        ours = _step(lambda *x: linear_attention(*x)[0], leaves, dout.detach())
        steps[T] = ours
        peer = _sdpa(bench, T, 8) if bench.max_peer_seq_len >= T else None
        yield bench.compare(f"linear_attention vector decay T{T}-H8-D64", ours, peer, "SDPA causal")
        inputs = sum(x.nbytes for x in leaves)
        results = inputs + dout.nbytes  # gradients and the output
        extra = (bench.peak_bytes(ours) - results) / inputs
        case = f"linear_attention memory beyond results T{T}"
        yield Row(case, "extra_memory", extra, "x inputs", "goal", 3.0, 3.0 / max(extra, 1e-9))
    short, long = bench.seconds(steps[4096], steps[65536])
    case = "linear_attention time from T4096 to T65536"
    yield Row(case, "growth", long / short, "x", "linear", 16.0, 16.0 * short / long)


def _sdpa(bench: OpBench, T: int, H: int) -> Compute:
    q, k, v, dout = (bench.draw(1, H, T, 64) for _ in range(4))
    return _step(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        [q, k, v],
        dout.detach(),
    )


def _attention(bench: OpBench, T: int, H: int, window_size: int | None) -> Compute:
    q, k, v, dout = (bench.draw(1, T, H, 64) for _ in range(4))
    return _step(lambda *x: attention(*x, window_size=window_size)[0], [q, k, v], dout.detach())


def _bench_attention(bench: OpBench) -> Iterator[Row]:
    for T in (2048, 8192):
        peer = _sdpa(bench, T, 9)
        ours = _attention(bench, T, 9, None)
        yield bench.compare(f"attention causal T{T}-H9-D64", ours, peer, "SDPA causal")
    window = 1024
    short, long, full = bench.seconds(
        _attention(bench, 8192, 8, window), _attention(bench, 65536, 8, window),
        _sdpa(bench, 4096, 8),
    )  # fmt: skip
    case = f"attention window {window} time from T8192 to T65536"
    yield Row(case, "growth", long / short, "x", "linear", 8.0, 8.0 * short / long)
    keys = 65536 * window - window * (window - 1) / 2
    mine, other = long / keys / 8 * 1e12, full / (4096 * 4097 / 2) / 8 * 1e12
    case = f"attention window {window} T65536 per visible key"
    yield Row(case, "time_per_key", mine, "ps", "SDPA causal T4096", other, other / mine)


def _bench_delta_rule(bench: OpBench) -> Iterator[Row]:
    for T in (4096, 16384):
        q, k, v, dout = (bench.draw(1, T, 8, 64) for _ in range(4))
        k = F.normalize(k.detach(), dim=-1).requires_grad_()
        beta = torch.rand(1, T, 8, device=bench.device).to(bench.dtype).requires_grad_()
        log_decay = (-0.1 * torch.rand(1, T, 8, device=bench.device)).requires_grad_()
        leaves = [q, k, v, beta, log_decay]
        ours = _step(lambda *x: delta_rule(*x)[0], leaves, dout.detach())
        peer = _sdpa(bench, T, 8) if bench.max_peer_seq_len >= T else None
        yield bench.compare(f"delta_rule scalar decay T{T}-H8-D64", ours, peer, "SDPA causal")


def _bench_cross_entropy(bench: OpBench) -> Iterator[Row]:
    T, E, V = 8192, 576, 49152
    hidden = bench.draw(T, E)
    weight = (0.02 * bench.draw(V, E, grad=False)).requires_grad_()
    labels = torch.randint(V, (T,), device=bench.device)
    one = torch.ones((), device=bench.device)

    def plain(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="sum")

    ours = _step(lambda h, w: linear_cross_entropy(h, w, labels)[0], [hidden, weight], one)
    peer = _step(plain, [hidden, weight], one)
    case, name = f"linear_cross_entropy T{T}-E{E}-V{V}", "cross_entropy(linear)"
    yield bench.compare(case, ours, peer, name)
    mine, other = bench.peak_bytes(ours) / 2**20, bench.peak_bytes(peer) / 2**20
    yield Row(case, "peak_memory", mine, "MiB", name, other, other / mine)


def _bench_spike(bench: OpBench) -> Iterator[Row]:
    x, dcount = bench.draw(8192, 3584), bench.draw(8192, 3584, grad=False)
    ours = _step(lambda x: spike_count(x)[0], [x], dcount)
    source, target = x.detach(), torch.empty_like(x)

    def copy_into_old_memory() -> None:
        for _ in range(3):
            target.copy_(source)

    def copy_into_new_memory() -> None:
        for _ in range(3):
            source.clone()

    yield bench.compare("spike_count 8192x3584", ours, copy_into_new_memory, "3 x clone")
    yield bench.compare("spike_count 8192x3584", ours, copy_into_old_memory, "3 x copy_")
    count = torch.randint(-8, 9, (2048, 3584), device=bench.device, dtype=torch.int8)
    weight = torch.randint(-127, 128, (3584, 3584), device=bench.device, dtype=torch.int8)
    wide_count, wide_weight = count.to(bench.dtype), weight.to(bench.dtype)
    yield bench.compare(
        "spike_matmul int8 2048x3584x3584",
        lambda: spike_matmul(count, weight),
        lambda: F.linear(wide_count, wide_weight),
        "linear",
    )


def _bench_rms_norm(bench: OpBench) -> Iterator[Row]:
    x, dout = bench.draw(8192, 3584), bench.draw(8192, 3584, grad=False)
    weight = torch.ones(3584, device=bench.device, requires_grad=True)
    ours = _step(lambda x, w: rms_norm(x, w, 1e-6), [x, weight], dout)

    def plain(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        return (wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * w).to(x.dtype)

    yield bench.compare("rms_norm 8192x3584", ours, _step(plain, [x, weight], dout), "eager")


def _bench_rotary(bench: OpBench) -> Iterator[Row]:
    x, dout = bench.draw(1, 8192, 28, 128), bench.draw(1, 8192, 28, 128, grad=False)
    cos, sin = rotary_table(torch.arange(8192, device=bench.device), 128, 1e6)
    whole_cos, whole_sin = (torch.cat((t, t), -1)[:, None].to(x.dtype) for t in (cos, sin))

    def plain(x: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, -1)
        return x * whole_cos + torch.cat((-b, a), -1) * whole_sin

    ours = _step(lambda x: rotary(x, cos, sin), [x], dout)
    yield bench.compare("rotary T8192-H28-D128", ours, _step(plain, [x], dout), "eager")


def _bench_swiglu(bench: OpBench) -> Iterator[Row]:
    gate, up = bench.draw(2048, 18944), bench.draw(2048, 18944)
    dout = bench.draw(2048, 18944, grad=False)
    peer = _step(lambda g, u: F.silu(g) * u, [gate, up], dout)
    yield bench.compare("swiglu 2048x18944", _step(swiglu, [gate, up], dout), peer, "eager")


def _bench_short_conv(bench: OpBench) -> Iterator[Row]:
    x, dout = bench.draw(1, 8192, 3584), bench.draw(1, 8192, 3584, grad=False)
    weight = bench.draw(3584, 4)

    def plain(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        out = F.conv1d(F.pad(x.mT, (3, 0)), w[:, None], groups=w.shape[0])
        return out.mT

    ours = _step(lambda x, w: short_conv(x, w)[0], [x, weight], dout)
    peer = _step(plain, [x, weight], dout)
    yield bench.compare("short_conv T8192-C3584-K4", ours, peer, "conv1d")


def _bench_moe(bench: OpBench) -> Iterator[Row]:
    """Yield 16 experts, from one without a token to one with twice the mean, beside a loop."""

    def loop(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        # unbind, since the gradient of weight[i] would be as large as weight itself.
        pairs = zip(x.split(lengths), weight.unbind(), strict=True)
        return torch.cat([F.linear(rows, matrix) for rows, matrix in pairs])

    for tokens, (E, size) in itertools.product((64, 1024), ((256, 704), (1024, 1408))):
        counts = torch.arange(16, device=bench.device) * 2 * tokens // 15
        lengths = counts.tolist()
        x, weight = bench.draw(sum(lengths), E), bench.draw(16, size, E)
        dout = bench.draw(len(x), size, grad=False)
        ours = _step(lambda x, w, counts=counts: grouped_matmul(x, w, counts), [x, weight], dout)
        peer = _step(loop, [x, weight], dout)
        case = f"grouped_matmul {E}x{size}, 16 experts of {tokens} tokens"
        yield bench.compare(case, ours, peer, "a loop over experts")


def _bench_int8_linear(bench: OpBench) -> Iterator[Row]:
    """Yield one token, whose cost is that of reading the weights, and many."""
    for (rows, copies), group_size in itertools.product(((1, 16), (512, 1)), (3584, 128)):
        # Of one token as many matrices as caches do not hold; as a vector it costs the peer less.
        wide = [30 * bench.draw(3584, 3584, grad=False) for _ in range(copies)]
        codes = [weight.clamp(-127, 127).to(torch.int8) for weight in wide]
        count = (9 * bench.draw(rows, 3584, grad=False)).round()
        threshold = torch.ones(rows, 1, device=bench.device)
        scale = torch.ones(3584, 3584 // group_size, device=bench.device)
        ours = partial(int8_linear, count, threshold, scale=scale, group_size=group_size)
        peer = partial(F.linear, count[0] if rows == 1 else count)
        case = f"int8_linear {copies} of {rows}x3584x3584, groups of {group_size}"
        yield bench.compare(case, _over(ours, codes), _over(peer, wide), "linear")


def _over(product: Callable[..., torch.Tensor], weights: Sequence[torch.Tensor]) -> Compute:
    """Return a function that multiplies by all the weights."""

    def compute() -> None:
        for weight in weights:
            product(weight=weight)

    return compute


SUITES: dict[str, Callable[[OpBench], Iterator[Row]]] = {
    "linear_attention": _bench_linear_attention,
    "delta_rule": _bench_delta_rule,
    "attention": _bench_attention,
    "cross_entropy": _bench_cross_entropy,
    "spike": _bench_spike,
    "rms_norm": _bench_rms_norm,
    "rotary": _bench_rotary,
    "swiglu": _bench_swiglu,
    "short_conv": _bench_short_conv,
    "moe": _bench_moe,
    "int8_linear": _bench_int8_linear,
}
