"""Ahead-of-time compilation of Triton kernels for GPUs that are not there.

A `triton_impl.py` lists its kernels as `Build`s, for every dtype and size that ships; `compile_for`
says what each costs on a target: registers, spills, shared memory and bytes of machine code.
Kernels that were imported with TRITON_INTERPRET=1 cannot be compiled.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ops.triton_runtime import Blocks


class Target(NamedTuple):
    """A GPU architecture and what a block of threads may use there."""

    gpu: GPUTarget
    shared_bytes: int
    """Shared memory (LDS) of one block."""


TARGETS = {
    # Most shared memory of a block: CUDA C++ programming guide, table of compute capabilities.
    "sm_80": Target(GPUTarget("cuda", 80, 32), 163 * 1024),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 227 * 1024),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 227 * 1024),
    # LDS of a workgroup: instruction set references of CDNA 2 and CDNA 3.
    "gfx90a": Target(GPUTarget("hip", "gfx90a", 64), 64 * 1024),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64 * 1024),
}


@dataclass(frozen=True)
class Build:
    """One kernel for one combination of types and constants."""

    kernel: Any
    """The decorated function. Names tell types: `p_*` pointers, others int32 or a constant."""
    case: str
    """The combination, as in bf16-D64."""
    dtype: str
    """Triton's name of the element type behind pointers that `types` does not name: bf16, fp32."""
    constants: dict[str, Any]
    """Values of the constexpr parameters; None for a pointer that is absent."""
    blocks: Blocks
    """Block sizes (constexpr as well), num_warps and num_stages."""
    types: dict[str, str] = field(default_factory=dict)
    """Triton types of parameters that differ: {"p_lse": "*fp32", "scale": "fp32"}."""


@dataclass(frozen=True)
class Binary:
    """What a compiled kernel takes of the machine."""

    registers: int
    """Of a thread (AMD: vector registers)."""
    spilled_bytes: int
    """Registers that went to memory (AMD: four bytes for each lane of a spilled register)."""
    shared_bytes: int
    code_bytes: int


def compile_for(build: Build, arch: str) -> Binary:
    """Compile a kernel for one of `TARGETS`.

    Raises:
        RuntimeError: kernels are interpreted in this process, or the compiler failed.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("kernels are interpreted here; start without TRITON_INTERPRET to build")
    target = TARGETS[arch]
    options = {name: x for name, x in build.blocks.items() if name.islower()}
    constants = build.constants | {n: x for n, x in build.blocks.items() if n.isupper()}
    signature, attributes = {}, {}
    for index, name in enumerate(build.kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        is_pointer = name.startswith("p_")
        signature[name] = build.types.get(name, f"*{build.dtype}" if is_pointer else "i32")
        if is_pointer:  # PyTorch's allocations are aligned
            attributes[index,] = [["tt.divisibility", 16]]
    source = ASTSource(build.kernel, signature, constants, attributes)
    binary = triton.compile(source, target=target.gpu, options=options)
    measure = _measure_nvidia if target.gpu.backend == "cuda" else _measure_amd
    return measure(binary)


def _measure_nvidia(binary: Any) -> Binary:
    code = binary.asm["cubin"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(code)
        tool = triton.knobs.nvidia.cuobjdump.path
        command = [tool, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (
        int(re.findall(rf"{name}:(\d+)", text)[-1]) for name in ("REG", "STACK", "LOCAL")
    )
    return Binary(registers, stack + local, binary.metadata.shared, len(code))


def _measure_amd(binary: Any) -> Binary:
    text, code = binary.asm["amdgcn"], binary.asm["hsaco"]
    registers, vector_spills, scalar_spills = (
        int(re.findall(rf"\.{name}:\s+(\d+)", text)[-1])
        for name in ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count")
    )
    spilled = 4 * (vector_spills + scalar_spills)
    return Binary(registers, spilled, binary.metadata.shared, len(code))
