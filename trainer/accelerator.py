"""What the trainer asks of a device family; the families are in cluster/accelerators/."""

from typing import Protocol

import torch


class Accelerator(Protocol):
    """One device family. Not a class to inherit from: an object with these members."""

    name: str
    backend: str
    """Collective backend of torch.distributed."""
    deepspeed_name: str
    """Value of DS_ACCELERATOR."""

    def device(self, local_rank: int) -> torch.device:
        """Return the device of a rank on this host."""

    def unsupported(self, dtype: torch.dtype) -> str | None:
        """Return why the device cannot compute in `dtype`, or None."""

    def prefers_bfloat16(self) -> bool:
        """Return whether the device multiplies bfloat16 faster than float32."""

    def synchronize(self) -> None:
        """Wait until the device has done all it was given."""

    def peak_memory_bytes(self) -> int:
        """Return the most memory this process has held on the device (host memory for a CPU)."""

    def description(self) -> str:
        """Return the model of the device for people."""
