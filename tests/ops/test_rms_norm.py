"""rms_norm against its definition, and the definition against torch.nn.functional."""

import pytest
import torch
import torch.nn.functional as F
from helpers.assertions import assert_close

from ops.rms_norm import rms_norm


def test_reference_is_the_norm_of_pytorch():
    x, weight = torch.randn(3, 7, 33, dtype=torch.float64), torch.randn(33, dtype=torch.float64)
    expected = F.rms_norm(x, (33,), weight, 1e-6)
    assert_close("out", rms_norm(x, weight, 1e-6, impl="reference"), expected, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (5, 3, 64), (1, 257, 9)], ids=str)
@pytest.mark.parametrize("size", [1.0, 1e-6, 1e6])
def test_torch_equals_reference(dtype, shape, size):
    x = (torch.randn(shape) * size).to(dtype)
    weight, dout = torch.randn(shape[-1]), torch.randn(shape).to(dtype)
    results = []
    for impl, wide in (("torch", dtype), ("reference", torch.float64)):
        inputs = [x.to(wide).requires_grad_(), weight.double().requires_grad_()]
        if impl == "torch":
            inputs[1] = weight.clone().to(torch.promote_types(dtype, torch.float32))
            inputs[1].requires_grad_()
        out = rms_norm(*inputs, 1e-6, impl=impl)
        results.append([out, *torch.autograd.grad(out, inputs, dout.to(wide))])
    for name, actual, expected in zip(("out", "dx", "dweight"), *results, strict=True):
        if name == "dx" and shape[-1] == 1 and size > 1e-3:
            continue  # a single channel is constant: its gradient is rounding
        assert_close(name, actual, expected, dtype)


def test_weight_must_fit():
    with pytest.raises(ValueError, match=r"weight \(4,\) must be \[E\]"):
        rms_norm(torch.randn(2, 5), torch.ones(4), 1e-6)
