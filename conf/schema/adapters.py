"""Low-rank adapters."""

from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from conf.schema.base import STRICT, PositiveFloat, PositiveInt


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AdaptersConfig:
    """W + (alpha / rank) B A in place of W (arXiv:2106.09685), of which A and B are trained."""

    rank: PositiveInt
    alpha: PositiveFloat
    targets: Annotated[list[str], Field(min_length=1)]
    """Names of projections in a layer, or of modules that hold some: q_proj, down_proj, mixer."""
