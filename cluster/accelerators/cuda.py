"""NVIDIA GPUs through CUDA and NCCL."""

import torch


class CUDA:
    name = "cuda"
    backend = "nccl"
    deepspeed_name = "cuda"

    def device(self, local_rank: int) -> torch.device:
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)

    def unsupported(self, dtype: torch.dtype) -> str | None:
        if not torch.cuda.is_available():
            return "PyTorch sees no CUDA device; use accelerator=cpu"
        if dtype == torch.bfloat16 and not torch.cuda.is_bf16_supported(False):
            return "this GPU has no bfloat16; use dtype=float32"
        return None

    def prefers_bfloat16(self) -> bool:
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(False)

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def peak_memory_bytes(self) -> int:
        return torch.cuda.max_memory_allocated()

    def description(self) -> str:
        return torch.cuda.get_device_name()


ACCELERATOR = CUDA()
