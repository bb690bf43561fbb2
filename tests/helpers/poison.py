"""Make memory that was never written show up as NaN."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

_MAKERS = (
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (torch.Tensor, "new_empty"),
    (torch.Tensor, "new_empty_strided"),
)


@contextlib.contextmanager
def poison_uninitialized() -> Iterator[None]:
    """Fill what torch.empty and its kin return with NaN, in float dtypes, while inside.

    PyTorch's own filling needs its deterministic mode, which changes the algorithms under test.
    """
    # `with torch.device(...)` remembers the functions it redirects when it first redirects one:
    # that must be the real ones.
    with torch.device("cpu"):
        torch.empty(0)
    with contextlib.ExitStack() as stack:
        for owner, name in _MAKERS:
            patched = _poisoned(getattr(owner, name))
            stack.enter_context(mock.patch.object(owner, name, patched))
        yield


def _poisoned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(make)
    def wrapper(*args: Any, **kwargs: Any) -> torch.Tensor:
        out = make(*args, **kwargs)
        if out.is_floating_point() and out.layout == torch.strided and not out.is_quantized:
            with torch.no_grad():
                out.fill_(float("nan"))
        return out

    return wrapper
