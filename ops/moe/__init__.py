"""Mixture of experts without dropped tokens: route, sort by expert, multiply by groups, combine.

Equations 15 to 18 of arXiv:2509.05276 without expert capacity. Everything repeats bit for bit;
`counts`, how many rows each expert gets, is the load that balance is judged by.
"""

from typing import Literal

import torch

from ops.registry import FLOATS, Implementation, choose

IMPLEMENTATIONS = (
    Implementation(
        "cpp",
        "ops.moe.cpp_impl",
        ("cpu",),
        (torch.bfloat16,),
        requires="ops.cpp_build:explain_no_amx",
    ),
    Implementation(
        "triton",
        "ops.moe.triton_impl",
        ("cuda",),
        (torch.float32, torch.bfloat16, torch.float16),
        requires="ops.triton_runtime:explain_absence",
        on_request=("cpu",),
    ),
    Implementation("torch", "ops.moe.torch_impl", None, FLOATS),
    Implementation("reference", "ops.moe.reference", None, FLOATS),
)
# Only products have a kernel in C++: whoever pins cpp gets the rest of PyTorch, in every dtype.
REST_IMPLEMENTATIONS = (
    Implementation("cpp", "ops.moe.torch_impl", ("cpu",), FLOATS, on_request=("cpu",)),
    *IMPLEMENTATIONS[1:],
)


def route(
    logits: torch.Tensor,
    k: int,
    *,
    normalize: bool = True,
    score: Literal["softmax", "sigmoid"] = "softmax",
    bias: torch.Tensor | None = None,
    impl: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the k experts of each token that score highest and weigh them by their scores.

    Args:
        logits: router logits [N, G] of N tokens and G experts, without NaN.
        k: experts per token, 1 to G.
        normalize: divide the weights of a token by their sum. The quotient is that of the exact
            scores: finite, and of sum 1, for any finite logits, even if all scores round to 0.
        score: what a score is: `softmax(logits)` over the experts, or `sigmoid(logits)` of each.
        bias: float32 [G], added to the scores where experts are chosen, not where they are weighed
            (eq. 3 of arXiv:2408.15664); not differentiable.
        impl: pin an implementation by name.

    Returns:
        weights [N, k], float32 (float64 for float64 logits), differentiable, and experts [N, k],
        int64, by falling logit, or by falling sum of score and bias where there is a bias; of
        equal ones the expert with the lower index comes first.

    Raises:
        ValueError: logits are no matrix, k or bias does not fit, or score has no meaning.
    """
    if logits.dim() != 2:
        raise ValueError(f"logits have shape {list(logits.shape)}; give [tokens, experts]")
    if not 1 <= k <= logits.shape[1]:
        raise ValueError(f"k={k} must be within 1 and the {logits.shape[1]} experts of logits")
    if score not in ("softmax", "sigmoid"):
        raise ValueError(f"score={score} must be softmax or sigmoid")
    if bias is not None and (bias.shape != logits.shape[1:] or bias.dtype != torch.float32):
        raise ValueError(
            f"bias is {bias.dtype} {list(bias.shape)}; give float32 [{logits.shape[1]}]"
        )
    weights, experts = choose("moe.route", REST_IMPLEMENTATIONS, logits, impl)(
        logits, k, normalize, score, None if bias is None else bias.detach()
    )
    return weights, experts


def permute(
    x: torch.Tensor, experts: torch.Tensor, num_experts: int, *, impl: str | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Repeat each token for each of its experts, sorted by expert, then by token and slot.

    Args:
        x: tokens [N, E].
        experts: int64 [N, k], each below num_experts.
        num_experts: G, how many experts there are.
        impl: pin an implementation by name.

    Returns:
        sorted_x [N k, E], differentiable; order, int64 [N k], where row i of sorted_x is token
        order[i] // k for its slot order[i] % k; counts, int64 [G], rows of each expert.

    Raises:
        ValueError: shapes or dtypes that do not fit together, or (on a CPU) an expert out of range.
    """
    if x.dim() != 2 or experts.dim() != 2 or len(x) != len(experts) or not experts.shape[1]:
        raise ValueError(
            f"x has shape {list(x.shape)}, experts {list(experts.shape)}; give [tokens, size] and "
            "[tokens, experts per token]"
        )
    _check_int64("experts", experts)
    if experts.device.type == "cpu":
        outside = experts[(experts < 0) | (experts >= num_experts)]
        if len(outside):
            raise ValueError(
                f"experts hold {outside[0].item()}; give 0 to {num_experts - 1}, or raise "
                f"num_experts={num_experts}"
            )
    sorted_x, order, counts = choose("moe.permute", REST_IMPLEMENTATIONS, x, impl)(
        x, experts, num_experts
    )
    return sorted_x, order, counts


def unpermute(
    y: torch.Tensor, order: torch.Tensor, weights: torch.Tensor, *, impl: str | None = None
) -> torch.Tensor:
    """Sum the rows of each token, times the weights of its experts: the way back of `permute`.

    Args:
        y: rows [N k, E], sorted as `permute` sorts them.
        order: int64 [N k], from `permute`.
        weights: [N, k], float32 (float64 for float64 y), from `route`.
        impl: pin an implementation by name.

    Returns:
        out [N, E] in y's dtype, summed in float32; gradients flow to y and weights.

    Raises:
        ValueError: shapes or dtypes that do not fit together.
    """
    if y.dim() != 2 or weights.dim() != 2 or not len(y) == order.numel() == weights.numel():
        raise ValueError(
            f"y has shape {list(y.shape)}, order {list(order.shape)}, weights "
            f"{list(weights.shape)}; give [N k, size], [N k] and [N, k]"
        )
    _check_int64("order", order)
    if weights.dtype != torch.promote_types(y.dtype, torch.float32):
        raise ValueError(f"weights are {weights.dtype}; give float32, or float64 for float64 y")
    out: torch.Tensor = choose("moe.unpermute", REST_IMPLEMENTATIONS, y, impl)(y, order, weights)
    return out


def grouped_matmul(
    x: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor, *, impl: str | None = None
) -> torch.Tensor:
    """Multiply each group of rows by its own matrix: `out[rows of g] = x[rows of g] weight[g]^T`.

    Args:
        x: rows [M, E], group after group.
        weight: [G, F, E] of x's dtype; each is laid out as the weight of `torch.nn.Linear`.
        counts: int64 [G], rows of each group, any of them 0, M in all.
        impl: pin an implementation by name.

    Returns:
        out [M, F] in x's dtype. Every group has a gradient of its weight, zero without rows.

    Raises:
        ValueError: shapes or dtypes that do not fit together, or (on a CPU) counts that do not sum
            to M. A GPU does not wait to see counts: there rows beyond their sum stay unwritten.
    """
    if x.dim() != 2 or weight.dim() != 3 or x.shape[1] != weight.shape[2]:
        raise ValueError(
            f"x has shape {list(x.shape)}, weight {list(weight.shape)}; give [rows, size] and "
            "[groups, out size, size]"
        )
    if weight.dtype != x.dtype:
        raise ValueError(f"weight is {weight.dtype}, x {x.dtype}; convert one of them")
    if counts.shape != weight.shape[:1]:
        raise ValueError(f"counts have shape {list(counts.shape)}; give [{weight.shape[0]}]")
    _check_int64("counts", counts)
    if counts.device.type == "cpu":
        lengths = counts.tolist()
        if sum(lengths) != len(x) or min(lengths, default=0) < 0:
            raise ValueError(f"counts={lengths} must not be negative and sum to {len(x)} rows")
    function = choose("moe.grouped_matmul", IMPLEMENTATIONS, x, impl)
    out: torch.Tensor = function(x, weight, counts)
    return out


def _check_int64(name: str, x: torch.Tensor) -> None:
    if x.dtype != torch.int64:
        raise ValueError(f"{name} is {x.dtype}; give int64")
