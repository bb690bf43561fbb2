"""Linear cross entropy: the definition against PyTorch's own, the rest against the definition."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.assertions import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from ops.cross_entropy import linear_cross_entropy, triton_impl
from ops.triton_runtime import trying

DTYPES = {
    "torch": (torch.float64, torch.float32, torch.bfloat16),
    "triton": (torch.float32, torch.bfloat16),
}
IMPLEMENTATIONS = [
    pytest.param(impl, dtype, id=f"{impl}-{str(dtype).removeprefix('torch.')}")
    for impl, dtypes in DTYPES.items()
    for dtype in dtypes
]
V, E = 997, 48
OPTIONS = {
    "plain": {},
    "smooth": {"label_smoothing": 0.1},
    "z": {"z_loss": 0.01},
    "smooth-z": {"label_smoothing": 0.3, "z_loss": 0.1},
}
# Several blocks of a row of logits.
BLOCKS = {"BLOCK_V": 512, "num_warps": 4, "num_stages": 1}
ALL_OPTIONS = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def make_inputs(
    shape: tuple[int, ...], dtype: torch.dtype, magnitude: float = 1.0, ignored: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return hidden, weight and labels, of which the first ones do not count."""
    hidden = (magnitude * torch.randn(*shape, E)).to(dtype)
    weight = (0.3 * torch.randn(V, E)).to(dtype)
    labels = torch.randint(V, shape)
    labels.view(-1)[:ignored] = -100
    return hidden, weight, labels


def run(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, impl: str, **options: float
) -> dict[str, torch.Tensor]:
    """Return loss_sum, num_valid and the gradients of a multiple of the loss."""
    leaves = [x.detach().requires_grad_() for x in (hidden, weight)]
    with trying("cross_entropy", "cross_entropy", 1 << 20, BLOCKS):
        loss_sum, num_valid = linear_cross_entropy(*leaves, labels, impl=impl, **options)
    assert loss_sum.dtype == torch.float32
    assert num_valid.dtype == torch.int64
    dhidden, dweight = torch.autograd.grad(0.37 * loss_sum, leaves)
    return {"loss_sum": loss_sum, "num_valid": num_valid, "dhidden": dhidden, "dweight": dweight}


def check(
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    impl: str,
    has_exact_logits: bool = True,
    **options: float,
) -> dict[str, torch.Tensor]:
    """Compare an implementation with the reference, whose results are returned.

    Gradients are compared where the rounding of logits leaves more than a digit of a softmax.
    """
    hidden, weight, labels = inputs
    expected = run(hidden.double(), weight.double(), labels, "reference", **options)
    actual = run(*inputs, impl, **options)
    assert actual["num_valid"] == expected["num_valid"]
    dtype = hidden.dtype
    loss_dtype = torch.float32 if dtype == torch.float64 else dtype
    assert_close("loss_sum", actual["loss_sum"], expected["loss_sum"], loss_dtype)
    for key in ("dhidden", "dweight"):
        if has_exact_logits:
            assert_close(key, actual[key], expected[key], dtype)
        else:
            assert actual[key].isfinite().all()
    return expected


@ALL_OPTIONS
@pytest.mark.parametrize("ignored", [0, 20])
def test_reference_is_cross_entropy(ignored: int, options: dict[str, float]) -> None:
    inputs = make_inputs((2, 40), torch.float64, ignored=ignored)
    actual = run(*inputs, "reference", **options)
    hidden, weight = (x.requires_grad_() for x in inputs[:2])
    logits, labels = F.linear(hidden, weight).flatten(0, 1), inputs[2].flatten()
    smoothing = options.get("label_smoothing", 0.0)
    loss = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)
    normalizers = logits.exp().sum(dim=1).log()[labels != -100]
    loss = loss + options.get("z_loss", 0.0) * (normalizers**2).sum()
    expected = torch.autograd.grad(0.37 * loss, (hidden, weight))
    assert actual["num_valid"] == 80 - ignored
    assert_close("loss_sum", actual["loss_sum"], loss, torch.float32)
    # The gradient for the float32 loss arrives in float32.
    assert_close("dhidden", actual["dhidden"], expected[0], torch.float32)
    assert_close("dweight", actual["dweight"], expected[1], torch.float32)


@pytest.mark.parametrize(("impl", "dtype"), IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("shape", "ignored", "chunk_tokens", "options"),
    [
        pytest.param((1,), 0, 64, "plain", id="N1"),
        pytest.param((1,), 1, 64, "smooth-z", id="N1-none-counts"),
        pytest.param((63,), 1, 1, "plain", id="N63-chunks-of-1"),
        pytest.param((64,), 50, 64, "smooth", id="N64-few-count"),
        pytest.param((65,), 0, 64, "z", id="N65-chunks-of-33"),
        pytest.param((65,), 65, 64, "plain", id="N65-none-counts"),
        pytest.param((2, 50), 7, 30, "smooth-z", id="B2-T50-chunks-of-25"),
        pytest.param((2, 50), 7, 1000, "smooth-z", id="B2-T50-one-chunk"),
    ],
)
def test_implementation_equals_reference(
    shape: tuple[int, ...],
    ignored: int,
    chunk_tokens: int,
    options: str,
    impl: str,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chunk_bytes = chunk_tokens * V * dtype.itemsize
    monkeypatch.setattr("ops.cross_entropy.chunks.CHUNK_BYTES", chunk_bytes)
    inputs = make_inputs(shape, dtype, ignored=ignored)
    expected = check(inputs, impl, **OPTIONS[options])
    assert expected["num_valid"] == inputs[2].numel() - ignored


@ALL_OPTIONS
@pytest.mark.parametrize(("impl", "dtype"), IMPLEMENTATIONS)
def test_improbable_labels_have_their_finite_loss(
    dtype: torch.dtype, impl: str, options: dict[str, float]
) -> None:
    inputs = make_inputs((40,), dtype, magnitude=100.0)
    expected = check(inputs, impl, dtype != torch.bfloat16, **options)
    assert expected["loss_sum"] > 100 * 40  # beyond the smallest probability of 32 bits


@pytest.mark.parametrize(("impl", "dtype"), IMPLEMENTATIONS)
def test_certain_labels_keep_the_accuracy_of_a_small_loss(dtype: torch.dtype, impl: str) -> None:
    # Halves below 64: no dtype rounds these logits.
    weight, labels = torch.randint(-1, 2, (V, E)).to(dtype), torch.randint(V, (40,))
    expected = check((weight[labels] / 2, weight, labels), impl)
    assert 0 < expected["loss_sum"] < 0.01 * len(labels)


@pytest.mark.parametrize("impl", DTYPES)
def test_a_thousand_tokens_of_strided_inputs(impl: str) -> None:
    hidden = torch.randn(E, 1000).half().mT
    weight = (0.3 * torch.randn(131, 2 * E)).half()[:, ::2]
    labels = torch.randint(131, (1000, 2))[:, 0]
    check((hidden, weight, labels), impl, label_smoothing=0.1, z_loss=0.01)


class _Largest(TorchDispatchMode):
    """Remember the largest tensor that is made inside."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.numel = max(self.numel, out.numel())
        return out


@pytest.mark.parametrize("impl", DTYPES)
def test_logits_of_all_tokens_never_exist(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ops.cross_entropy.chunks.CHUNK_BYTES", 10 * V * 4)
    inputs = make_inputs((100,), torch.float32)
    with _Largest() as largest:
        run(*inputs, impl, **OPTIONS["smooth-z"])
    assert largest.numel == E * V < 100 * V


@pytest.mark.parametrize("impl", ["reference", *DTYPES])
def test_only_the_asked_gradients_are_made(impl: str) -> None:
    hidden, weight, labels = make_inputs((20,), torch.float32)
    with torch.no_grad():
        plain, _ = linear_cross_entropy(hidden.requires_grad_(), weight, labels, impl=impl)
    assert not plain.requires_grad
    loss_sum, _ = linear_cross_entropy(hidden, weight, labels, impl=impl)
    loss_sum.backward()
    assert weight.grad is None
    assert_close("loss_sum", plain, loss_sum, torch.float32)
    frozen, _ = linear_cross_entropy(hidden.detach(), weight.requires_grad_(), labels, impl=impl)
    frozen.backward()
    assert weight.grad is not None


@pytest.mark.parametrize("impl", DTYPES)
def test_a_second_backward_pass_is_refused(impl: str) -> None:
    hidden, weight, labels = make_inputs((5,), torch.float32)
    loss_sum, _ = linear_cross_entropy(hidden.requires_grad_(), weight, labels, impl=impl)
    loss_sum.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        loss_sum.backward()


@pytest.mark.parametrize("label", [V, -1])
def test_a_label_out_of_range_makes_the_loss_of_a_kernel_nan(label: int) -> None:
    hidden, weight, labels = make_inputs((3,), torch.float32)
    labels[1] = label
    options = {"ignore_index": -100, "label_smoothing": 0.0, "z_loss": 0.0}
    loss_sum, _ = triton_impl.linear_cross_entropy(hidden, weight, labels, **options)
    assert loss_sum.isnan()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(8, 3)}, "hidden has shape"),
        ({"hidden": torch.zeros(4)}, "hidden has shape"),
        ({"labels": torch.zeros(7, dtype=torch.int64)}, "labels are"),
        ({"labels": torch.zeros(8, dtype=torch.int32)}, "labels are"),
        ({"labels": torch.full((8,), 9)}, "labels hold 9; give 0 to 8"),
        ({"labels": torch.full((8,), -100), "ignore_index": -1}, "labels hold -100"),
        ({"weight": torch.zeros(9, 4).double()}, "convert one of them"),
        ({"label_smoothing": 1.1}, "within 0 and 1"),
        ({"z_loss": -1e-4}, "must not be negative"),
        ({"impl": "cuda"}, "no such implementation"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, object], message: str) -> None:
    labels = torch.zeros(8, dtype=torch.int64)
    arguments = {"hidden": torch.zeros(8, 4), "weight": torch.zeros(9, 4), "labels": labels}
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**{**arguments, **change})
