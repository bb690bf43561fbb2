"""Linear cross entropy: the definition against PyTorch's own, the rest against the definition."""

import pytest
import torch
import torch.nn.functional as F
from helpers.assertions import assert_close

from ops.cross_entropy import linear_cross_entropy

IMPLEMENTATIONS = ("torch",)
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
V, E = 997, 48


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
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, impl: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return loss_sum, num_valid and the gradients of a multiple of the loss."""
    leaves = [x.detach().requires_grad_() for x in (hidden, weight)]
    loss_sum, num_valid = linear_cross_entropy(*leaves, labels, impl=impl)
    assert loss_sum.dtype == torch.float32
    assert num_valid.dtype == torch.int64
    dhidden, dweight = torch.autograd.grad(0.37 * loss_sum, leaves)
    return loss_sum, num_valid, dhidden, dweight


@pytest.mark.parametrize("ignored", [0, 20])
def test_reference_is_cross_entropy(ignored: int) -> None:
    inputs = make_inputs((2, 40), torch.float64, ignored=ignored)
    loss_sum, num_valid, dhidden, dweight = run(*inputs, "reference")
    hidden, weight = (x.requires_grad_() for x in inputs[:2])
    logits = F.linear(hidden, weight).flatten(0, 1)
    loss = F.cross_entropy(logits, inputs[2].flatten(), reduction="sum")
    expected = torch.autograd.grad(0.37 * loss, (hidden, weight))
    assert num_valid == 80 - ignored
    assert_close("loss_sum", loss_sum, loss, torch.float32)
    # The gradient for the float32 loss arrives in float32.
    assert_close("dhidden", dhidden, expected[0], torch.float32)
    assert_close("dweight", dweight, expected[1], torch.float32)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("ignored", [0, 1, 50])
@pytest.mark.parametrize("shape", [(1,), (65,), (2, 100)], ids=str)
@pytest.mark.parametrize("chunk_tokens", [1, 64, 1000])
def test_implementation_equals_reference(
    shape: tuple[int, ...],
    ignored: int,
    chunk_tokens: int,
    dtype: torch.dtype,
    impl: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chunk_bytes = chunk_tokens * V * dtype.itemsize
    monkeypatch.setattr("ops.cross_entropy.torch_impl.CHUNK_BYTES", chunk_bytes)
    hidden, weight, labels = make_inputs(shape, dtype, ignored=ignored)
    expected = run(hidden.double(), weight.double(), labels, "reference")
    actual = run(hidden, weight, labels, impl)
    assert actual[1] == expected[1] == max(0, labels.numel() - ignored)
    loss_dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    assert_close("loss_sum", actual[0], expected[0], loss_dtype)
    assert_close("dhidden", actual[2], expected[2], dtype)
    assert_close("dweight", actual[3], expected[3], dtype)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_improbable_labels_have_their_finite_loss(dtype: torch.dtype, impl: str) -> None:
    hidden, weight, labels = make_inputs((65,), dtype, magnitude=100.0)
    expected = run(hidden.double(), weight.double(), labels, "reference")
    actual = run(hidden, weight, labels, impl)
    assert expected[0] > 100 * 65  # beyond the smallest probability of 32 bits
    loss_dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    assert_close("loss_sum", actual[0], expected[0], loss_dtype)
    assert all(grad.isfinite().all() for grad in actual[2:])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_certain_labels_keep_the_accuracy_of_a_small_loss(dtype: torch.dtype, impl: str) -> None:
    _, weight, labels = make_inputs((65,), dtype)
    hidden = 4 * weight[labels]
    expected = run(hidden.double(), weight.double(), labels, "reference")
    actual = run(hidden, weight, labels, impl)
    assert 0 < expected[0] < 0.01 * len(labels)
    loss_dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    assert_close("loss_sum", actual[0], expected[0], loss_dtype)


@pytest.mark.parametrize("impl", ["reference", *IMPLEMENTATIONS])
def test_only_the_asked_gradients_are_made(impl: str) -> None:
    hidden, weight, labels = make_inputs((65,), torch.float32)
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


def test_a_second_backward_pass_is_refused() -> None:
    hidden, weight, labels = make_inputs((65,), torch.float32)
    loss_sum, _ = linear_cross_entropy(hidden.requires_grad_(), weight, labels, impl="torch")
    loss_sum.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        loss_sum.backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(8, 3)}, "hidden has shape"),
        ({"hidden": torch.zeros(4)}, "hidden has shape"),
        ({"labels": torch.zeros(7, dtype=torch.int64)}, "labels are"),
        ({"labels": torch.zeros(8, dtype=torch.int32)}, "labels are"),
        ({"weight": torch.zeros(9, 4).double()}, "convert one of them"),
        ({"impl": "cuda"}, "no such implementation"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, object], message: str) -> None:
    labels = torch.zeros(8, dtype=torch.int64)
    arguments = {"hidden": torch.zeros(8, 4), "weight": torch.zeros(9, 4), "labels": labels}
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**{**arguments, **change})
