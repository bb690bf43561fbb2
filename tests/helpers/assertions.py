"""Compare tensors under the one table of tolerances that all tests share."""

import torch

# Relative Frobenius error against a float64 result on the same (rounded) inputs.
TOLERANCES = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.bfloat16: 2e-2,
    torch.float16: 5e-3,
}


def assert_close(
    name: str, actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype
) -> None:
    """Fail unless `actual` is finite and near `expected` for results computed in `dtype`.

    The measure is |actual - expected| / |expected| in the Frobenius norm; where `expected` is
    zero, `actual` must be below the tolerance itself.
    """
    assert actual.shape == expected.shape, (
        f"{name}: shape {list(actual.shape)}, expected {list(expected.shape)}"
    )
    difference = actual.detach().double() - expected.detach().double()
    assert difference.isfinite().all(), f"{name}: {_count_nonfinite(difference)} values not finite"
    largest = difference.abs().max().item() if difference.numel() else 0.0
    norm = expected.detach().double().norm().item()
    error = difference.norm().item() / (norm or 1.0)
    tolerance = TOLERANCES[dtype]
    message = f"{name}: max abs error {largest:.3e}, relative error {error:.3e}"
    assert error <= tolerance, f"{message} > {tolerance:.0e} ({dtype})"


def _count_nonfinite(x: torch.Tensor) -> str:
    return f"{int((~x.isfinite()).sum())} of {x.numel()}"
