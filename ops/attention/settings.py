"""What attention is told beside its tensors, in one frozen object for autograd."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """The pattern of visible keys and the scale of the scores."""

    causal: bool
    window_size: int | None
    num_sinks: int
    scale: float
    documents: tuple[int, ...] | None
    """Bounds of the packed documents; None: every row is one document."""

    def count_open_keys(self, num_keys: int) -> int:
        """Return how many of a document's first keys all its queries see."""
        return min(self.num_sinks, num_keys) if self.causal else num_keys
