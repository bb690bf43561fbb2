"""Any CPU, through PyTorch's own kernels and gloo."""

import platform
import resource
from pathlib import Path

import torch


class CPU:
    name = "cpu"
    backend = "gloo"
    deepspeed_name = "cpu"

    def device(self, local_rank: int) -> torch.device:
        return torch.device("cpu")

    def unsupported(self, dtype: torch.dtype) -> str | None:
        return None

    def prefers_bfloat16(self) -> bool:
        # float32 has no matrix unit on a CPU; bfloat16 has one with AMX, or dot products.
        return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()

    def synchronize(self) -> None:
        return None

    def peak_memory_bytes(self) -> int:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if platform.system() == "Darwin" else peak * 1024

    def description(self) -> str:
        cpuinfo = Path("/proc/cpuinfo")
        lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        return names[0] if names else platform.processor() or platform.machine()


ACCELERATOR = CPU()
