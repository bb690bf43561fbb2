"""Launch settings of the delta rule's kernels, and every build of them that ships."""

import itertools
from typing import Any

import torch
import triton.language as tl

from ops.delta_rule import triton_backward, triton_forward, triton_scores
from ops.triton_build import Build
from ops.triton_runtime import Blocks, find_blocks

HEAD_DIMS = (32, 64, 128)
"""Channels of a head that the kernels take."""
KERNELS = {
    "sums": triton_scores._delta_rule_sums_kernel,
    "scores_fwd": triton_scores._delta_rule_scores_fwd_kernel,
    "prepare": triton_forward._delta_rule_prepare_kernel,
    "states_fwd": triton_forward._delta_rule_states_fwd_kernel,
    "out_fwd": triton_forward._delta_rule_out_fwd_kernel,
    "values_bwd": triton_backward._delta_rule_values_bwd_kernel,
    "states_bwd": triton_backward._delta_rule_states_bwd_kernel,
    "solve_bwd": triton_backward._delta_rule_solve_bwd_kernel,
    "scores_bwd": triton_scores._delta_rule_scores_bwd_kernel,
    "inputs_bwd": triton_backward._delta_rule_inputs_bwd_kernel,
}
FLOAT_POINTERS = (
    *("beta", "log_decay", "decay", "sums", "rest", "error", "total", "initial", "states"),
    *("final", "du", "dstates", "dfinal", "dinitial", "dbeta", "ddecay", "dnext", "dx"),
    *("dq_scores", "dk_scores", "dsums"),
)  # fmt: skip
TYPES = {f"p_{name}": "*fp32" for name in FLOAT_POINTERS} | {
    "p_chunks": "*i32",
    "p_documents": "*i32",
    "scale": "fp32",
}


def chunk_size(dtype: torch.dtype) -> int:
    """Return the tokens of a chunk."""
    return 32 if dtype == torch.float32 else 64


def settings(
    name: str, D_K: int, D_V: int, arch: str | torch.device, dtype: torch.dtype, *, vector: bool
) -> Blocks:
    """Return the launch settings of a kernel; no block is wider than the heads."""
    wide = "_fp32" if dtype == torch.float32 else ""
    blocks = find_blocks("delta_rule", _setting(name, vector) + wide, max(D_K, D_V), arch)
    widest = {"BK": D_K, "BV": D_V, "BLOCK": D_K}
    return {name: min(value, widest.get(name, value)) for name, value in blocks.items()}


def constants(
    name: str, D_K: int, D_V: int, dtype: torch.dtype, dot: tl.dtype, *, vector: bool
) -> dict[str, Any]:
    """Return the constants of a kernel but its blocks."""
    C = chunk_size(dtype)
    values = {"D_K": D_K, "D_V": D_V, "VECTOR": vector, "DOT": dot, "C": C}
    values["LOG_C"] = C.bit_length() - 1
    return {n: x for n, x in values.items() if n in KERNELS[name].arg_names}


def list_builds(arch: str) -> list[Build]:
    """Return every kernel for every dtype, head dim and, where it matters, kind of decay."""
    types = {
        "bf16": (torch.bfloat16, tl.bfloat16),
        "fp16": (torch.float16, tl.float16),
        "fp32": (torch.float32, tl.float32),
    }
    builds = []
    for name, short, D, vector in itertools.product(KERNELS, types, HEAD_DIMS, (False, True)):
        if vector and _setting(name, vector) == name:
            continue
        dtype, dot = types[short]
        constant = constants(name, D, D, dtype, dot, vector=vector)
        # Only the sums of decay of float32 inputs have a rest.
        if dtype != torch.float32 and "p_rest" in KERNELS[name].arg_names:
            constant["p_rest"] = None
        blocks = settings(name, D, D, arch, dtype, vector=vector)
        case = f"{short}-D{D}" + ("-vector" if vector else "")
        builds.append(Build(KERNELS[name], case, short, constant, blocks, TYPES))
    return builds


def _setting(name: str, vector: bool) -> str:
    return f"{name}_vector" if vector and "VECTOR" in KERNELS[name].arg_names else name


def _candidates(name: str, wide: str) -> tuple[Blocks, ...]:
    sizes = {"BK": (16, 32), "BV": (16, 32) if wide else (32, 64), "BLOCK": (32, 64, 128)}
    if name.startswith("states"):
        sizes["BK"] = (32, HEAD_DIMS[-1])
    used = {n: sizes[n] for n in sizes if n in KERNELS[name].arg_names}
    blocks = (dict(zip(used, values, strict=True)) for values in itertools.product(*used.values()))
    launches = [{"num_warps": w, "num_stages": s} for w in (1, 4, 8) for s in (1, 2)]
    return tuple(block | launch for block in blocks for launch in launches)


SEARCH: dict[str, tuple[Blocks, ...]] = {
    _setting(name, vector) + wide: _candidates(name, wide)
    for name in KERNELS
    for vector in (False, True)
    for wide in ("", "_fp32")
}
