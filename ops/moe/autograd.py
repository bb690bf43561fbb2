"""The gradient of products of groups: keeps rows and weight; implementations bring the passes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

Product = Callable[[torch.Tensor, torch.Tensor, Any], torch.Tensor]


class Products(NamedTuple):
    """The passes; the last argument of each is `counts`, as the implementation wants them."""

    fwd: Product
    """Of x [M, E] and weight [G, F, E]: out [M, F]."""
    dx: Product
    """Of dout [M, F] and weight: dx [M, E]."""
    dweight: Product
    """Of dout and x: dweight [G, F, E]."""


class GroupedMatmul(torch.autograd.Function):
    """Apply (x, weight, counts, products)."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, counts: Any, products: Products
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.counts, ctx.products = counts, products
        return products.fwd(x, weight, counts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_dx, needs_dweight, *_ = ctx.needs_input_grad
        dout = dout.contiguous()
        dx = ctx.products.dx(dout, weight, ctx.counts) if needs_dx else None
        dweight = ctx.products.dweight(dout, x, ctx.counts) if needs_dweight else None
        return dx, dweight, None, None
