"""Low-rank adapters of projections (arXiv:2106.09685): W + (alpha / rank) B A in place of W.

The forward pass multiplies by that sum, made in float32 and cast afterwards, so that a model whose
adapters are merged computes the very same numbers. B begins at zero.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from conf.schema import AdaptersConfig
from models.layers import Projection, WeightAdapter, multiply


class Adapter(WeightAdapter):
    """What is added to the weight of a projection."""

    scale: torch.Tensor

    def __init__(self, in_features: int, out_features: int, config: AdaptersConfig) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.empty(config.rank, in_features))
        self.b = nn.Parameter(torch.empty(out_features, config.rank))
        # A buffer, so that a checkpoint says by itself what its weights are.
        self._scale = float(np.float32(config.alpha / config.rank))
        self.register_buffer("scale", torch.tensor(self._scale))

    def merge(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the sum [out, in] of a weight of that shape and the adapter."""
        return add_product(weight, self.a, self.b, self._scale)

    def forward(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Return [..., out] from [..., in]."""
        out: torch.Tensor = _AdaptedProduct.apply(x, weight, self.a, self.b, self._scale)
        return out

    def reset(self) -> None:
        """Draw A, and let the adapter add nothing."""
        nn.init.normal_(self.a, std=self.a.shape[1] ** -0.5)
        nn.init.zeros_(self.b)
        self.scale.fill_(self._scale)


def add_product(
    weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float
) -> torch.Tensor:
    """Return weight + scale b a; [out, in] of [rank, in] and [out, rank]."""
    return torch.addmm(weight, b, a, alpha=scale)


def add_adapters(model: nn.Module, config: AdaptersConfig, *, is_whole: bool = True) -> None:
    """Give an adapter to each projection that `config` targets.

    Args:
        model: the layers, or a part of them.
        config: the section.
        is_whole: all layers are here, so that every target must be.

    Raises:
        ValueError: a target is no projection of the model, or the rank exceeds the size of one.
    """
    projections = {n: m for n, m in model.named_modules() if isinstance(m, Projection)}
    names = {part for name in projections for part in name.split(".") if not part.isdigit()}
    missing = [target for target in config.targets if target not in names]
    if missing and is_whole:
        raise ValueError(
            f"adapters.targets: no projection of the model is {' or '.join(missing)}; use some of "
            f"{', '.join(sorted(names))}"
        )
    for name, projection in projections.items():
        if set(config.targets).isdisjoint(name.split(".")):
            continue
        out_features, in_features = projection.weight.shape
        if config.rank > min(out_features, in_features):
            raise ValueError(
                f"adapters.rank={config.rank} exceeds {name}, {out_features} x {in_features}; use "
                f"adapters.rank={min(out_features, in_features)} or less, or other targets"
            )
        projection.adapter = Adapter(in_features, out_features, config)


def adapters_of(model: nn.Module) -> Iterator[tuple[str, Projection, Adapter]]:
    """Yield the projections that have an adapter, by name."""
    for name, module in model.named_modules():
        if isinstance(module, Projection) and isinstance(module.adapter, Adapter):
            yield name, module, module.adapter


@torch.no_grad()
def merge_adapters(model: nn.Module) -> int:
    """Put the adapters into the weights and take them away; return how many there were."""
    adapted = list(adapters_of(model))
    for _, projection, _ in adapted:
        projection.weight.copy_(projection.matrix())
        projection.adapter = None
    return len(adapted)


class _AdaptedProduct(torch.autograd.Function):
    """x (weight + scale b a)^T, which keeps no sum and makes no gradient of the size of one."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight, a, b)
        ctx.scale = scale
        return multiply(x, add_product(weight, a, b, scale).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, a, b = ctx.saved_tensors
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            dx = dout @ add_product(weight, a, b, ctx.scale).to(x.dtype)
        x, dout = x.flatten(0, -2), dout.flatten(0, -2)  # [T, in], [T, out]
        if ctx.needs_input_grad[1]:
            dweight = (dout.T @ x).to(weight.dtype)
        da = (dout @ b.to(x.dtype)).T @ x
        db = dout.T @ (x @ a.to(x.dtype).T)
        return dx, dweight, ctx.scale * da.to(a.dtype), ctx.scale * db.to(b.dtype), None
