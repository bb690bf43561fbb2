"""rotary against its definition; angles, relative positions and the inverse."""

import pytest
import torch
from helpers.assertions import assert_close

from ops.rotary import rotary, rotary_table


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("head_dim", [2, 32, 64])
def test_torch_equals_reference(dtype, heads, head_dim):
    x = torch.randn(2, 9, heads, head_dim).to(dtype)
    dout = torch.randn_like(x)
    table = rotary_table(torch.arange(9) * 1000, head_dim, 1e4)
    results = []
    for impl, wide in (("torch", dtype), ("reference", torch.float64)):
        inputs = x.to(wide).requires_grad_()
        out = rotary(inputs, *table, impl=impl)
        results.append([out, *torch.autograd.grad(out, inputs, dout.to(wide))])
    for name, actual, expected in zip(("out", "dx"), *results, strict=True):
        assert_close(name, actual, expected, dtype)


def test_scores_depend_on_the_distance_alone():
    q, k = torch.randn(2, 1, 1, 1, 64, dtype=torch.float64).unbind(0)
    scores = []
    for shift in (0, 17, 5000):
        tables = (rotary_table(torch.tensor([p + shift]), 64, 1e4) for p in (12, 3))
        a, b = (rotary(x, *table) for x, table in zip((q, k), tables, strict=True))
        scores.append((a * b).sum())
    assert_close("shifted by 17", scores[1], scores[0], torch.float32)
    assert float((scores[2] - scores[0]).abs()) < 1e-2  # float32 angles at position 5,000


def test_pairs_turn_by_position_times_frequency():
    x = torch.zeros(1, 2, 1, 4, dtype=torch.float64)
    x[..., 1] = 1.0  # second pair: channels 1 and 3, frequency theta^(-1/2)
    out = rotary(x, *rotary_table(torch.tensor([0, 3]), 4, 100.0))
    angle = torch.tensor(0.3)
    expected = torch.stack([torch.zeros(()), angle.cos(), torch.zeros(()), angle.sin()]).double()
    assert_close("position 3", out[0, 1, 0], expected, torch.float32)
    assert_close("position 0", out[0, 0], x[0, 0], torch.float64)


def test_table_must_fit():
    with pytest.raises(ValueError, match="even D"):
        rotary(torch.randn(1, 4, 2, 8), *rotary_table(torch.arange(5), 8, 1e4))
