"""Feature maps of linear attention: what queries and keys become so that their products weigh.

All but `none` give features of at least 0, so that the weights are what softmax attention's are.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from models.layers import HeadProjection
from models.spiking import SpikeEncoder

FeatureKind = Literal["relu", "sigmoid", "elu", "exp", "hedgehog", "none"]
LARGEST_EXPONENT = 30.0
"""exp is constant from here on: products of features stay far below the largest float32."""


def feature_dim(kind: FeatureKind, head_dim: int) -> int:
    """Return how many features (D_k) a head of `head_dim` channels has."""
    return 2 * head_dim if kind == "hedgehog" else head_dim


def fixed_features(kind: FeatureKind, x: torch.Tensor) -> torch.Tensor:
    """Return the features of a map without parameters, in the shape and dtype of x."""
    if kind == "relu":
        return x.relu()
    if kind == "none":
        return x
    # In bfloat16 the derivative of a sigmoid, k (1 - k), would be 0 wherever k rounds to 1, above
    # 6, and features close to 0 would lose their digits.
    wide = x.float()
    if kind == "sigmoid":
        wide = wide.sigmoid()
    elif kind == "elu":
        wide = wide.relu() + wide.clamp(max=0).exp()  # elu(x) + 1 without the cancellation
    else:
        wide = wide.clamp(max=LARGEST_EXPONENT).exp()
    return wide.to(x.dtype)


class Hedgehog(nn.Module):
    """softmax(W x) and softmax(-W x) beside each other, with a W of each head's own.

    Trained to give the weights of softmax attention (arXiv:2402.04347); W begins as the identity.
    """

    def __init__(self, num_heads: int, head_dim: int, encoder: SpikeEncoder) -> None:
        super().__init__()
        self.encode = encoder
        self.proj = HeadProjection(num_heads, head_dim, head_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [B, T, H, 2 D] from [B, T, H, D]."""
        logits = self.proj(self.encode(x.flatten(2))).float()
        return torch.cat([F.softmax(logits, -1), F.softmax(-logits, -1)], dim=-1).to(x.dtype)

    def reset(self) -> None:
        """Begin with the features of x itself."""
        with torch.no_grad():
            self.proj.weight.copy_(torch.eye(self.proj.weight.shape[1]))
