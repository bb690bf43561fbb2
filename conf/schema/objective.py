"""What a run minimises, and which parameters it trains."""

import re
from typing import Literal

from pydantic.dataclasses import dataclass

from conf.schema.base import STRICT, PositiveFloat, Ratio


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ObjectiveConfig:
    kind: Literal["next_token", "attention_transfer", "distillation"] = "next_token"
    """next_token: cross entropy; attention_transfer: each mixer that differs from the teacher's
    learns the output of the teacher's; distillation: cross entropy and the teacher's logits."""
    teacher: str | None = None
    """Run directory, or one of its checkpoints, of the frozen model to learn from."""
    weight: Ratio = 0.5
    """Share of KL(teacher || student) in the loss, beside cross entropy (distillation)."""
    temperature: PositiveFloat = 1.0
    """Logits of both are divided by it before the divergence (distillation)."""
    train: str | None = None
    """Regular expression: parameters in whose name it is found are trained, the others frozen, as
    in [.]mixer[.]; null: all, of attention_transfer those of the mixers that differ."""

    def __post_init__(self) -> None:
        if self.kind == "next_token" and self.teacher is not None:
            raise ValueError(
                f"teacher={self.teacher} teaches nothing with kind=next_token; use teacher=null, "
                "or kind=distillation or attention_transfer"
            )
        if self.kind != "next_token" and self.teacher is None:
            raise ValueError(
                f"kind={self.kind} needs a teacher; name a run directory, or use kind=next_token"
            )
        try:
            re.compile(self.train or "")
        except re.error as error:
            raise ValueError(f"train={self.train!r} is no regular expression ({error})") from error
