"""Mixture of experts: the reference against dense sums over all experts, the rest against it."""

from functools import partial

import pytest
import torch
from helpers.assertions import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st

from ops.moe import grouped_matmul, permute, route, unpermute

IMPLEMENTATIONS = ("torch", "triton")
DTYPES = {
    "torch": (torch.float64, torch.float32, torch.bfloat16),
    "triton": (torch.float32, torch.bfloat16),
}
E, F = 72, 40  # more than one block of each product, the last one cut
INDICES = ("experts", "counts", "order")
SCORES = ("softmax", "sigmoid")


def make_inputs(
    num_tokens: int, num_experts: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return logits with many ties, tokens and the weights of linear experts."""
    logits = torch.randint(-4, 5, (num_tokens, num_experts)) / 2
    weight = torch.randn(num_experts, F, E) / E**0.5
    return logits.to(dtype), torch.randn(num_tokens, E).to(dtype), weight.to(dtype)


def make_dout(num_tokens: int) -> torch.Tensor:
    return torch.randn(num_tokens, F, generator=torch.Generator().manual_seed(1)).bfloat16()


def make_bias(num_experts: int) -> torch.Tensor:
    """Return biases that leave ties and change choices, but let no two scores nearly tie."""
    return torch.randint(2, (num_experts,)) * 0.3


def run_layer(
    logits: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    k: int,
    normalize: bool,
    impl: str,
    score: str = "softmax",
    bias: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Return all that a layer of linear experts computes, and every gradient."""
    leaves = [t.detach().requires_grad_() for t in (logits, x, weight)]
    weights, experts = route(leaves[0], k, normalize=normalize, score=score, bias=bias, impl=impl)
    sorted_x, order, counts = permute(leaves[1], experts, len(weight), impl=impl)
    y = grouped_matmul(sorted_x, leaves[2], counts, impl=impl)
    out = unpermute(y, order, weights, impl=impl)
    made = (leaves[0], weights, leaves[1], sorted_x, leaves[2], y)
    names = ("dlogits", "dweights", "dx", "dsorted_x", "dweight", "dy")
    grads = torch.autograd.grad(out, made, make_dout(len(x)).to(out.dtype))
    results = {"experts": experts, "counts": counts, "order": order, "weights": weights}
    results |= {"sorted_x": sorted_x, "y": y, "out": out}
    return results | dict(zip(names, grads, strict=True))


def run_dense(
    logits: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    k: int,
    normalize: bool,
    score: str,
    bias: torch.Tensor | None,
) -> dict[str, torch.Tensor]:
    """Return the same from products of every token with every expert, masked by a one-hot."""
    leaves = [t.detach().requires_grad_() for t in (logits, x, weight)]
    index = torch.arange(logits.shape[1])
    # An expert is chosen if fewer than k others are ahead of it.
    scores = leaves[0].exp()
    scores = scores / (scores.sum(1, keepdim=True) if score == "softmax" else 1 + scores)
    keys = scores.detach() + (0 if bias is None else bias)
    keys = (keys * 1e12).round()  # equal ones may have been rounded apart
    ahead = keys[:, None] > keys[..., None]
    ahead |= (keys[:, None] == keys[..., None]) & (index < index[:, None])
    chosen = (ahead.sum(-1) < k).double()
    gate = scores * chosen
    gate = gate / gate.sum(1, keepdim=True) if normalize else gate
    out = torch.einsum("ng,gfe,ne->nf", gate, leaves[2], leaves[1])
    grads = torch.autograd.grad(out, leaves, make_dout(len(x)).double())
    grads[0][grads[0].abs() < 1e-13] = 0  # the rounding of what is zero, as for a single expert
    grads = dict(zip(("dlogits", "dx", "dweight"), grads, strict=True))
    return {"counts": chosen.sum(0).long(), "out": out} | grads


def check(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for key, value in expected.items():
        if key in INDICES:
            assert torch.equal(actual[key], value), key
        else:
            assert_close(key, actual[key], value, actual["out"].dtype)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 70),
    st.integers(1, 9),
    st.integers(1, 4),
    st.booleans(),
    st.sampled_from(SCORES),
    st.booleans(),
)
def test_reference_is_a_dense_sum_over_experts(
    num_tokens: int, num_experts: int, k: int, normalize: bool, score: str, biased: bool
) -> None:
    k = min(k, num_experts)
    inputs = make_inputs(num_tokens, num_experts, torch.float64)
    bias = make_bias(num_experts) if biased else None
    actual = run_layer(*inputs, k, normalize, "reference", score, bias)
    assert actual["experts"].shape == actual["weights"].shape == (num_tokens, k)
    check(actual, run_dense(*inputs, k, normalize, score, bias))


impl_and_dtype = pytest.mark.parametrize(
    ("impl", "dtype"),
    [
        pytest.param(impl, dtype, id=f"{impl}-{str(dtype).removeprefix('torch.')}")
        for impl in IMPLEMENTATIONS
        for dtype in DTYPES[impl]
    ],
)


@impl_and_dtype
@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "k", "normalize"),
    [
        pytest.param(0, 4, 2, True, id="N0-G4-k2"),
        pytest.param(1, 5, 1, False, id="N1-G5-k1"),
        pytest.param(63, 16, 1, True, id="N63-G16-k1"),
        pytest.param(64, 3, 3, False, id="N64-G3-k3-plain"),
        pytest.param(65, 7, 4, True, id="N65-G7-k4"),
    ],
)
def test_layer_equals_reference(
    num_tokens: int, num_experts: int, k: int, normalize: bool, impl: str, dtype: torch.dtype
) -> None:
    inputs = make_inputs(num_tokens, num_experts, dtype)
    expected = run_layer(*(t.double() for t in inputs), k, normalize, "reference")
    actual = run_layer(*inputs, k, normalize, impl)
    assert actual["weights"].dtype == torch.promote_types(dtype, torch.float32)
    assert actual["out"].dtype == actual["dweight"].dtype == dtype
    check(actual, expected)


@impl_and_dtype
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "k", "normalize", "biased", "scale"),
    [
        pytest.param(33, 6, 2, True, False, 1, id="N33-G6-k2"),
        pytest.param(31, 8, 8, False, False, 1, id="N31-G8-k8-plain"),
        pytest.param(45, 9, 1, False, True, 1, id="N45-G9-k1-plain-bias"),
        pytest.param(77, 19, 4, True, True, 1, id="N77-G19-k4-bias"),
        pytest.param(40, 5, 3, True, False, 60, id="N40-G5-k3-extreme"),
        pytest.param(40, 5, 3, False, False, 60, id="N40-G5-k3-plain-extreme"),
    ],
)
def test_route_equals_reference(
    num_tokens: int,
    num_experts: int,
    k: int,
    normalize: bool,
    biased: bool,
    scale: float,
    score: str,
    impl: str,
    dtype: torch.dtype,
) -> None:
    logits = scale * make_inputs(num_tokens, num_experts, dtype)[0]
    settings = {"normalize": normalize, "score": score}
    settings |= {"bias": make_bias(num_experts) if biased else None}
    dweights = torch.randn(num_tokens, k)
    results = []
    for x, name in ((logits, impl), (logits.double(), "reference")):
        weights, experts = route(x.requires_grad_(), k, impl=name, **settings)
        (dlogits,) = torch.autograd.grad(weights, x, dweights.to(weights.dtype))
        results.append((weights, dlogits, experts))
    (*actual, experts), (*expected, expected_experts) = results
    assert torch.equal(experts, expected_experts)
    assert_close("weights", actual[0], expected[0], torch.promote_types(dtype, torch.float32))
    assert_close("dlogits", actual[1], expected[1], dtype)


@pytest.mark.parametrize("impl", ["reference", *IMPLEMENTATIONS])
def test_bias_chooses_but_does_not_weigh(impl: str) -> None:
    logits = torch.tensor([[-1000.0, -1001.0, 1000.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    bias = torch.tensor([2.0, 2.0, 0.0, -1.0], requires_grad=True)
    for score, weight in (("softmax", 0.25), ("sigmoid", 0.5)):
        # Scores that round to 0, all of them, are still divided by their sum.
        weights, experts = route(logits, 2, score=score, bias=bias, impl=impl)
        assert experts.tolist() == [[0, 1], [0, 1]]
        expected = torch.tensor([[1.0, 0.0], [0.0, 0.0]]).softmax(1)
        assert_close("weights", weights, expected, torch.float32)
        weights, _ = route(logits, 2, normalize=False, score=score, bias=bias, impl=impl)
        expected = torch.tensor([[0.0, 0.0], [weight, weight]])
        assert_close("weights", weights, expected, torch.float32)
        assert not weights.requires_grad


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_thousand_tokens_equal_reference(impl: str) -> None:
    inputs = make_inputs(1000, 5, torch.float16)
    expected = run_layer(*(t.double() for t in inputs), 1, False, "reference")
    check(run_layer(*inputs, 1, False, impl), expected)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@settings(deadline=None, max_examples=8)
@given(counts=st.lists(st.integers(0, 40), min_size=1, max_size=5))
def test_groups_of_any_size_are_multiplied(counts: list[int], impl: str) -> None:
    x, weight = torch.randn(sum(counts), E), torch.randn(len(counts), F, E)
    dout, ends = torch.randn(sum(counts), F), torch.tensor(counts).cumsum(0)
    owner = torch.searchsorted(ends, torch.arange(len(x)), right=True)
    chosen = torch.nn.functional.one_hot(owner, len(counts)).double()
    terms = (chosen, x.double(), weight.double(), dout.double())
    expected = [
        torch.einsum("mg,me,gfe->mf", *terms[:3]),
        torch.einsum("mg,mf,gfe->me", terms[0], terms[3], terms[2]),
        torch.einsum("mg,mf,me->gfe", terms[0], terms[3], terms[1]),
    ]
    leaves = (x.requires_grad_(), weight.requires_grad_())
    out = grouped_matmul(*leaves, torch.tensor(counts), impl=impl)
    actual = (out, *torch.autograd.grad(out, leaves, dout))
    for label, *pair in zip(("out", "dx", "dweight"), actual, expected, strict=True):
        assert_close(label, *pair, torch.float32)
    for group in (group for group, count in enumerate(counts) if not count):
        assert not actual[2][group].any()


@pytest.mark.parametrize("impl", ["reference", *IMPLEMENTATIONS])
@pytest.mark.parametrize("score", SCORES)
def test_of_equal_logits_the_first_experts_are_chosen(score: str, impl: str) -> None:
    logits = torch.zeros(3, 6)
    logits[1, 4], logits[2, :4] = 1.0, float("-inf")
    weights, experts = route(logits, 3, score=score, impl=impl)
    assert experts.tolist() == [[0, 1, 2], [4, 0, 1], [4, 5, 0]]
    assert_close("weights", weights[2], torch.tensor([0.5, 0.5, 0.0]), torch.float32)
    # Wherever in the tensor they are: vectors and what is left over may be rounded differently.
    logits, bias = torch.full((7, 5), -5.921875), torch.tensor([0, 0.5, 0, 0.5, 0.5])
    _, experts = route(logits, 4, score=score, bias=bias, impl=impl)
    assert experts.tolist() == [[1, 3, 4, 0]] * 7


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("impl", ["reference", *IMPLEMENTATIONS])
def test_logits_that_are_not_numbers_choose_experts_that_exist(impl: str) -> None:
    _, experts = route(torch.full((2, 5), float("nan")), 3, impl=impl)
    assert experts.tolist() == [[0, 1, 2]] * 2


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_inputs_may_be_strided(impl: str) -> None:
    logits, x, weight = make_inputs(20, 5, torch.float32)
    expected = run_layer(logits, x, weight, 2, True, impl)
    strided = (t.mT.contiguous().mT for t in (logits, x, weight))
    check(run_layer(*strided, 2, True, impl), expected)
    weights, experts = route(logits, 2, impl=impl)
    experts, weights = (t.mT.contiguous().mT for t in (experts, weights))
    sorted_x, order, _ = permute(x.requires_grad_(), experts, 5, impl=impl)
    unpermute(sorted_x, order, weights, impl=impl).sum().backward()  # a gradient without strides
    assert_close("dx", x.grad, torch.ones(20, E), torch.float32)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_results_repeat_bit_for_bit(impl: str) -> None:
    inputs = make_inputs(40, 5, torch.bfloat16)
    first, second = (run_layer(*inputs, 3, True, impl) for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("impl", ["reference", *IMPLEMENTATIONS])
def test_only_the_asked_gradients_are_made(impl: str) -> None:
    x, weight, counts = torch.ones(3, E), torch.ones(2, F, E), torch.tensor([3, 0])
    grouped_matmul(x.requires_grad_(), weight, counts, impl=impl).sum().backward()
    assert weight.grad is None
    grouped_matmul(x.detach(), weight.requires_grad_(), counts, impl=impl).sum().backward()
    assert_close("dweight", weight.grad[0], torch.full((F, E), 3.0), torch.float32)
    assert not weight.grad[1].any()


INT = torch.zeros(4, 2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (route, (torch.zeros(4), 1), "give \\[tokens, experts\\]"),
        (route, (torch.zeros(4, 3), 4), "k=4 must be within 1 and the 3 experts"),
        (partial(route, bias=torch.zeros(4)), (torch.zeros(4, 3), 1), "give float32 \\[3\\]"),
        (
            partial(route, bias=torch.zeros(3).half()),
            (torch.zeros(4, 3), 1),
            "bias is torch.float16",
        ),
        (partial(route, score="tanh"), (torch.zeros(4, 3), 1), "score=tanh must be"),
        (permute, (torch.zeros(5, 3), INT, 2), "x has shape"),
        (permute, (torch.zeros(4, 3), INT.int(), 2), "give int64"),
        (permute, (torch.zeros(4, 3), INT + 2, 2), "experts hold 2; give 0 to 1"),
        (unpermute, (torch.zeros(7, 3), INT.flatten(), torch.zeros(4, 2)), "y has shape"),
        (unpermute, (torch.zeros(8, 3), INT.flatten().int(), torch.zeros(4, 2)), "order is"),
        (unpermute, (torch.zeros(8, 3), INT.flatten(), torch.zeros(4, 2).half()), "give float32"),
        (grouped_matmul, (torch.zeros(8, 3), torch.zeros(4, 3, 2), INT[:, 0]), "x has shape"),
        (grouped_matmul, (torch.zeros(8, 3), torch.zeros(4, 2, 3).half(), INT[:, 0]), "convert"),
        (grouped_matmul, (torch.zeros(8, 3), torch.zeros(4, 2, 3), INT[0]), "counts have"),
        (grouped_matmul, (torch.zeros(8, 3), torch.zeros(4, 2, 3), INT[:, 0]), "sum to 8 rows"),
    ],
)
def test_what_does_not_fit_is_refused(function, arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        function(*arguments)
