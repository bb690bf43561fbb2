"""Linear distillation: the definition against PyTorch's own losses, the rest against it."""

import pytest
import torch
import torch.nn.functional as F
from helpers.assertions import assert_close

from ops.cross_entropy import linear_cross_entropy, linear_distillation

V, E, TEACHER_E = 997, 48, 32
OPTIONS = {
    "plain": {"share": 0.5, "temperature": 1.0},
    "soft": {"share": 0.3, "temperature": 2.5},
    "sharp": {"share": 1.0, "temperature": 0.5},
}


def make_inputs(dtype: torch.dtype, magnitude: float = 1.0) -> tuple[torch.Tensor, ...]:
    """Return hidden states and head of the student and of the teacher, and labels."""
    shape = (2, 41)
    tensors = []
    for size in (E, TEACHER_E):
        tensors.append((magnitude * torch.randn(*shape, size)).to(dtype))
        tensors.append((0.3 * torch.randn(V, size)).to(dtype))
    labels = torch.randint(V, shape)
    labels[0, :7] = -100
    return *tensors, labels


def run(inputs: tuple[torch.Tensor, ...], impl: str, **options: float) -> dict[str, torch.Tensor]:
    """Return what the operator does and the gradients of a multiple of the loss."""
    hidden, weight, *rest = inputs
    leaves = [x.detach().requires_grad_() for x in (hidden, weight)]
    teacher = [x.detach().requires_grad_() for x in rest[:2]]
    loss, cross_entropy, kl, num_valid = linear_distillation(
        *leaves, *teacher, rest[2], impl=impl, **options
    )
    assert num_valid == 75
    assert not cross_entropy.requires_grad
    assert not kl.requires_grad
    dhidden, dweight, *none = torch.autograd.grad(0.375 * loss, leaves + teacher, allow_unused=True)
    assert none == [None, None]
    figures = {"loss": loss, "cross_entropy": cross_entropy, "kl": kl}
    return figures | {"dhidden": dhidden, "dweight": dweight}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_reference_is_what_pytorch_computes(options: dict[str, float]) -> None:
    hidden, weight, teacher_hidden, teacher_weight, labels = make_inputs(torch.float64)
    got = run((hidden, weight, teacher_hidden, teacher_weight, labels), "reference", **options)
    leaves = [x.requires_grad_() for x in (hidden, weight)]
    logits, known = hidden @ weight.mT, teacher_hidden @ teacher_weight.mT
    T, share, valid = options["temperature"], options["share"], labels >= 0
    cross_entropy = F.cross_entropy(logits[valid], labels[valid], reduction="sum")
    soft = F.kl_div(
        F.log_softmax(logits[valid] / T, 1),
        F.softmax(known[valid] / T, 1),
        reduction="sum",
    )
    loss = (1 - share) * cross_entropy + share * T * T * soft
    dhidden, dweight = torch.autograd.grad(0.375 * loss, leaves)
    expected = {"loss": loss, "cross_entropy": cross_entropy, "kl": soft}
    for name, value in (expected | {"dhidden": dhidden, "dweight": dweight}).items():
        # Sums of losses are float32, gradients as exact as their inputs.
        dtype = torch.float64 if name.startswith("d") else torch.float32
        assert_close(name, got[name], value, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_torch_matches_reference_in_chunks(
    options: dict[str, float], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Several chunks, each of several blocks of rows.
    monkeypatch.setattr("ops.cross_entropy.chunks.CHUNK_BYTES", 20 * V * dtype.itemsize)
    inputs = make_inputs(dtype)
    got, expected = (run(inputs, impl, **options) for impl in ("torch", "reference"))
    for name, value in expected.items():
        of_sums = torch.float32 if dtype == torch.float64 else dtype
        assert_close(name, got[name], value, dtype if name.startswith("d") else of_sums)


def test_teacher_of_itself_leaves_the_cross_entropy() -> None:
    hidden, weight, *_, labels = make_inputs(torch.float32, magnitude=3.0)
    loss, cross_entropy, kl, _ = linear_distillation(
        hidden, weight, hidden, weight, labels, share=0.5, temperature=2.0
    )
    expected, _ = linear_cross_entropy(hidden, weight, labels)
    assert_close("cross_entropy", cross_entropy, expected, torch.float32)
    assert abs(kl) < 1e-4
    assert_close("loss", loss, 0.5 * expected, torch.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"share": 1.5}, "share=1.5 must be within 0 and 1"),
        ({"temperature": 0.0}, "temperature=0.0 must be above 0"),
        ({"teacher_weight": torch.zeros(5, TEACHER_E)}, "head has 5 tokens, the student's 997"),
    ],
)
def test_wrong_inputs_are_refused(change: dict[str, float | torch.Tensor], message: str) -> None:
    names = ("hidden", "weight", "teacher_hidden", "teacher_weight", "labels")
    inputs = dict(zip(names, make_inputs(torch.float32), strict=True))
    with pytest.raises(ValueError, match=message):
        linear_distillation(**(inputs | change))
