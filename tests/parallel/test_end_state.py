"""The closed form of a state is where the recurrence ends: values and gradients."""

import pytest
import torch
from helpers.assertions import assert_close

from ops.linear_attention import linear_attention
from parallel.sequence import end_state as module
from parallel.sequence.end_state import end_state

H, D_K, D_V = 2, 4, 3


def draw_inputs(T: int, decay: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    inputs = {"k": torch.randn(1, T, H, D_K), "v": torch.randn(1, T, H, D_V)}
    inputs = {name: x.to(dtype) for name, x in inputs.items()}
    size, _, cut = decay.partition("-")
    if size != "none":
        log_decay = -0.2 * torch.rand(1, T, H, *([D_K] if size == "vector" else []))
        if cut == "first":
            log_decay[:, 0] = -torch.inf
        elif cut == "last":
            log_decay[:, -1] = -torch.inf
        elif cut == "strong":
            log_decay *= 100
        elif cut:
            log_decay[:, T // 2] = -float(cut)
        inputs["log_decay"] = log_decay.to(torch.promote_types(dtype, torch.float32))
    return inputs


@pytest.mark.parametrize("tokens_at_once", [7, 100, 4096])
@pytest.mark.parametrize("T", [1, 22, 130])
@pytest.mark.parametrize(
    "decay",
    [
        "none",
        "scalar",
        "vector",
        "scalar-50",
        "vector-inf",
        "scalar-first",
        "vector-last",
        "vector-strong",
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_equals_the_end_of_the_recurrence(
    decay: str, T: int, tokens_at_once: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TOKENS_AT_ONCE", tokens_at_once)
    inputs = {n: x.requires_grad_() for n, x in draw_inputs(T, decay, dtype).items()}
    state, total = end_state(inputs["k"], inputs["v"], inputs.get("log_decay"))
    dstate = torch.randn_like(state)
    gradients = torch.autograd.grad(state, list(inputs.values()), dstate, retain_graph=True)

    exact = {n: x.detach().double().requires_grad_() for n, x in inputs.items()}
    q = torch.zeros(1, T, H, D_K, dtype=torch.float64)
    _, final = linear_attention(q, **exact, output_final_state=True, impl="reference")
    assert final is not None
    expected = torch.autograd.grad(final, list(exact.values()), dstate.double()[None])

    wide = torch.promote_types(dtype, torch.float32)
    assert state.dtype == wide
    assert_close("state", state, final[0], wide)
    for name, gradient, other in zip(inputs, gradients, expected, strict=True):
        assert gradient.dtype == inputs[name].dtype
        assert_close(f"d{name}", gradient, other, gradient.dtype)
    assert_total(total, inputs, exact)


def assert_total(
    total: torch.Tensor | None, inputs: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]
) -> None:
    """The decay over all tokens is the product of the tokens' decays, and so is its gradient."""
    if total is None:
        assert "log_decay" not in inputs
        return
    log_decay = inputs["log_decay"]
    assert total.shape == (H, D_K if log_decay.dim() == 4 else 1, 1)
    expected = exact["log_decay"][0].sum(0).exp().view(total.shape)
    dtotal = torch.randn_like(total)
    (gradient,) = torch.autograd.grad(total, [log_decay], dtotal)
    (other,) = torch.autograd.grad(expected, [exact["log_decay"]], dtotal.double())
    assert_close("total", total, drop_tiny(expected), total.dtype)
    assert_close("dlog_decay", gradient, drop_tiny(other), gradient.dtype)


def drop_tiny(x: torch.Tensor) -> torch.Tensor:
    """Return x without the numbers that float32 does not have."""
    return x.masked_fill(x.abs() < 1e-30, 0)
