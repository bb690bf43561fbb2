"""What `suite=tune` times: the function that a kernel serves, forward and backward.

A case is made for a size, which means what the rows of conf/blocks/<op>.yaml say (head dim, row
width, columns), and a number of tokens.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from ops.attention import attention, merge
from ops.cross_entropy import linear_cross_entropy
from ops.delta_rule import delta_rule
from ops.int8_linear import int8_linear
from ops.linear_attention import linear_attention, linear_attention_step
from ops.moe import grouped_matmul, permute, route, unpermute
from ops.rms_norm import rms_norm
from ops.rotary import rotary, rotary_table
from ops.short_conv import short_conv
from ops.spike import decode, encode, spike_count, spike_histogram, spike_matmul
from ops.swiglu import swiglu

Compute = Callable[[], object]
MAX_WIDTH = 1 << 17
"""Rows of the settings are for sizes up to a limit, which may be beyond what anybody has."""


def build_case(
    op: str, kernel: str, size: int, tokens: int, dtype: torch.dtype, device: torch.device
) -> Compute:
    """Return what to time for a kernel at a size."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        x = torch.randn(shape, device=device, generator=generator)
        return x.to(torch.float32 if kernel.endswith("_fp32") else dtype).requires_grad_()

    return CASES[find_case(op, kernel)](draw, min(size, MAX_WIDTH), tokens)


def find_case(op: str, kernel: str) -> str:
    """Return the name of the case that a kernel serves, the longest that begins its own."""
    return max((name for name in CASES if f"{op}.{kernel}".startswith(name)), key=len)


def _step(
    function: Callable[..., torch.Tensor | tuple[torch.Tensor, ...]], leaves: Sequence[torch.Tensor]
) -> Compute:
    """Return a function that computes forward and the gradients of the leaves."""

    def step() -> None:
        out = function(*leaves)
        out = out if isinstance(out, torch.Tensor) else out[0]
        torch.autograd.grad(out, leaves, torch.ones_like(out))

    return step


Draw = Callable[..., torch.Tensor]


def _attention(draw: Draw, D: int, T: int) -> Compute:
    return _step(
        lambda *x: attention(*x, impl="triton"), [draw(1, T, heads, D) for heads in (8, 2, 2)]
    )


def _merge(draw: Draw, D: int, T: int) -> Compute:
    outs, lses = ([draw(*shape) for _ in range(2)] for shape in ((1, T, 8, D), (1, 8, T)))
    lses = [lse.detach().float().requires_grad_() for lse in lses]
    leaves = [outs[0], lses[0], outs[1], lses[1]]
    return _step(lambda *x: merge(*x, impl="triton"), leaves)


def _linear_attention(draw: Draw, D: int, T: int) -> Compute:
    log_decay = F.logsigmoid(draw(1, T, 8, D).detach().float()).requires_grad_()
    leaves = [*(draw(1, T, 8, D) for _ in range(3)), log_decay]
    return _step(lambda *x: linear_attention(*x, impl="triton")[0], leaves)


def _linear_attention_step(draw: Draw, D: int, T: int) -> Compute:
    q, k, v, decay = (draw(T, 8, D).detach() for _ in range(4))
    state = torch.zeros(T, 8, D, D, device=q.device)
    log_decay = F.logsigmoid(decay.float())
    return lambda: linear_attention_step(q, k, v, log_decay, state, impl="triton")


def _delta_rule(draw: Draw, D: int, T: int) -> Compute:
    log_decay = F.logsigmoid(draw(1, T, 8, D).detach().float()).requires_grad_()
    k = F.normalize(draw(1, T, 8, D).detach(), dim=-1).requires_grad_()
    beta = draw(1, T, 8).detach().sigmoid().requires_grad_()
    leaves = [draw(1, T, 8, D), k, draw(1, T, 8, D), beta, log_decay]
    return _step(lambda *x: delta_rule(*x, impl="triton")[0], leaves)


def _cross_entropy(draw: Draw, V: int, T: int) -> Compute:
    hidden, weight = draw(T, 64), draw(V, 64)
    labels = torch.zeros(T, dtype=torch.int64, device=hidden.device)
    return _step(
        lambda h, w: linear_cross_entropy(h, w, labels, impl="triton")[0], [hidden, weight]
    )


def _rms_norm(draw: Draw, E: int, T: int) -> Compute:
    x, residual, weight = draw(T, E), draw(T, E), draw(E)
    return _step(
        lambda x, r, w: rms_norm(x, w, 1e-6, residual=r, impl="triton"), [x, residual, weight]
    )


def _rotary(draw: Draw, D: int, T: int) -> Compute:
    x = draw(1, T, 8, D)
    cos, sin = rotary_table(torch.arange(T, device=x.device), D, 1e6)
    return _step(lambda x: rotary(x, cos, sin, impl="triton"), [x])


def _swiglu(draw: Draw, width: int, T: int) -> Compute:
    return _step(lambda *x: swiglu(*x, impl="triton"), [draw(T, 1024), draw(T, 1024)])


def _short_conv(draw: Draw, C: int, T: int) -> Compute:
    leaves = [draw(1, T, C), draw(C, 4)]
    return _step(lambda *x: short_conv(*x, activation="silu", impl="triton")[0], leaves)


def _spike_count(draw: Draw, channels: int, T: int) -> Compute:
    return _step(lambda x: spike_count(x, impl="triton"), [draw(T, channels)])


def _counts(draw: Draw, T: int) -> torch.Tensor:
    return (2 * draw(T, 1024).detach()).round()


def _encode(draw: Draw, size: int, T: int) -> Compute:
    count = _counts(draw, T)
    return lambda: encode(count, "bitwise_bidirectional", num_steps=8, impl="triton")


def _decode(draw: Draw, size: int, T: int) -> Compute:
    train = encode(_counts(draw, T), "bitwise_bidirectional", num_steps=8)
    return lambda: decode(train, "bitwise_bidirectional", impl="triton")


def _histogram(draw: Draw, size: int, T: int) -> Compute:
    count = _counts(draw, T)
    return lambda: spike_histogram(count, impl="triton")


def _spike_matmul(draw: Draw, rows: int, T: int) -> Compute:
    count, weight = (draw(n, 1024).detach().clamp(-8, 8).to(torch.int8) for n in (rows, T))
    return lambda: spike_matmul(count, weight, impl="triton")


def _int8_linear(draw: Draw, rows: int, T: int) -> Compute:
    count, weight = (draw(n, 1024).detach().mul(20).round() for n in (rows, T))
    threshold, scale = (torch.ones(len(x), 1, device=x.device) for x in (count, weight))
    weight = weight.clamp(-127, 127).to(torch.int8)
    return lambda: int8_linear(count, threshold, weight, scale, impl="triton")


def _route(draw: Draw, num_experts: int, T: int) -> Compute:
    return _step(lambda x: route(x, 2, impl="triton")[0], [draw(T, num_experts)])


def _move_rows(draw: Draw, E: int, T: int) -> Compute:
    x, weights = draw(T, E), torch.ones(T, 2, device=draw(1).device)
    experts = torch.arange(2 * T, device=x.device).view(T, 2) % 8

    def there_and_back(x: torch.Tensor) -> torch.Tensor:
        rows, order, _ = permute(x, experts, 8, impl="triton")
        return unpermute(rows, order, weights, impl="triton")

    return _step(there_and_back, [x])


def _grouped_matmul(draw: Draw, columns: int, T: int) -> Compute:
    x, weight = draw(T, 1024), draw(8, min(columns, 4096), 1024)
    counts = torch.full((8,), T // 8, device=x.device)
    counts[0] += T - int(counts.sum())
    return _step(lambda x, w: grouped_matmul(x, w, counts, impl="triton"), [x, weight])


CASES: dict[str, Callable[[Draw, int, int], Compute]] = {
    "attention": _attention,
    "attention.merge": _merge,
    "linear_attention": _linear_attention,
    "linear_attention.step": _linear_attention_step,
    "delta_rule": _delta_rule,
    "cross_entropy": _cross_entropy,
    "rms_norm": _rms_norm,
    "rotary": _rotary,
    "swiglu": _swiglu,
    "short_conv": _short_conv,
    "spike": _spike_count,
    "spike.encode": _encode,
    "spike.decode": _decode,
    "spike.histogram": _histogram,
    "spike.spike_matmul": _spike_matmul,
    "int8_linear": _int8_linear,
    "moe": _grouped_matmul,
    "moe.route": _route,
    "moe.spread": _move_rows,
    "moe.combine": _move_rows,
}
