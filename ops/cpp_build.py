"""Compile an operator's CPU kernel once per machine and load it.

The library is named by a hash of all that it is made from, so that checkouts and versions of
PyTorch do not share one. Processes that need it at the same time wait for the first to build it.
"""

import fcntl
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils import cpp_extension

logger = logging.getLogger(__name__)

HEADER = Path(__file__).with_name("amx.h")
# What `explain_no_amx` asks of the CPU, no more: a cache may be shared by different machines.
FLAGS = ["-march=x86-64-v4", "-mavx512bf16", "-mamx-tile", "-mamx-bf16", "-mtune=native"]
FLAGS += ["-O3", "-fopenmp", "-std=c++20", "-fPIC", "-shared"]
LIBRARIES = ["c10", "torch_cpu", "torch"]  # OpenMP: the one PyTorch has loaded


def explain_no_amx(device: str) -> str | None:
    """Return why a kernel with matrix tiles cannot run on this machine, or None where it can."""
    if not (torch.cpu._is_avx512_bf16_supported() and torch.cpu._is_amx_tile_supported()):
        return "needs a CPU with AMX and AVX512-BF16"
    if not torch.cpu._init_amx():
        return "needs AMX, which the system does not lend to this process"
    return _explain_no_compiler()


def explain_no_avx512(device: str) -> str | None:
    """Return why a kernel of wide vectors cannot run on this machine, or None where it can."""
    if not torch.cpu._is_avx512_bf16_supported():
        return "needs a CPU with AVX512-BF16"
    return _explain_no_compiler()


@functools.cache
def load_kernel(op: str) -> Any:
    """Return the operators of `ops/<op>/cpu_kernel.cpp`, compiled first unless that was done.

    Raises:
        RuntimeError: the compiler failed.
    """
    torch.cpu._init_amx()
    source = Path(__file__).parent / op / "cpu_kernel.cpp"
    command = _build_command(source)
    parts = [source.read_bytes(), HEADER.read_bytes()]
    parts += [" ".join(command).encode(), torch.__version__.encode()]
    digest = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    folder = Path(cpp_extension.get_default_build_root()) / "longaxon"
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"{op}_{digest}.so"
    with (folder / f"{op}_{digest}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # gone with the process, however it ends
        if not library.exists():
            _compile(op, command, library)
    torch.ops.load_library(library)
    return getattr(torch.ops, f"longaxon_{op}")


def _explain_no_compiler() -> str | None:
    compiler = cpp_extension.get_cxx_compiler()
    if shutil.which(compiler) is None:
        return f"needs a C++ compiler, {compiler} is not on the path; install g++ 12 or later"
    return None


def _build_command(source: Path) -> list[str]:
    command = [cpp_extension.get_cxx_compiler(), *FLAGS, str(source), f"-I{HEADER.parent}"]
    for path in cpp_extension.include_paths("cpu"):
        command += ["-isystem", path]
    command += [f"-L{path}" for path in cpp_extension.library_paths("cpu")]
    return command + [f"-l{name}" for name in LIBRARIES]


def _compile(op: str, command: list[str], library: Path) -> None:
    logger.info("compiling the CPU kernel of %s, once: %s", op, library)
    start = time.perf_counter()
    partial = library.with_suffix(f".{os.getpid()}.partial")
    result = subprocess.run([*command, "-o", str(partial)], capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(
            f"{command[0]} could not compile ops/{op}/cpu_kernel.cpp; pin ops.{op}=torch to do "
            f"without it:\n{result.stderr[-4000:]}"
        )
    partial.replace(library)
    logger.info("compiled in %.0f s", time.perf_counter() - start)
