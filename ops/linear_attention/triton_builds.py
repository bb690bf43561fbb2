"""Launch settings of the kernels of linear attention, and every combination of them that ships."""

import itertools
from typing import Any

import triton
import triton.language as tl

from ops.linear_attention.triton_backward import (
    _linear_attention_bwd_qk_kernel,
    _linear_attention_bwd_v_kernel,
)
from ops.linear_attention.triton_forward import (
    NONE,
    SCALAR,
    VECTOR,
    _linear_attention_fwd_kernel,
    _linear_attention_scan_kernel,
    _linear_attention_step_kernel,
)
from ops.triton_build import Build
from ops.triton_runtime import Blocks, find_blocks

CHUNK = {"C": 64, "LEVELS": 6}
"""Tokens of a chunk, and how often it can be halved."""

_TILES = ((16, 32), (32, 32), (32, 64), (64, 64))


def _candidates(warps: tuple[int, ...], stages: tuple[int, ...] = (1,)) -> tuple[Blocks, ...]:
    return tuple(
        {"BK": BK, "BV": BV, "num_warps": num_warps, "num_stages": num_stages}
        for (BK, BV), num_warps, num_stages in itertools.product(_TILES, warps, stages)
    )


SEARCH: dict[str, tuple[Blocks, ...]] = {
    "scan": _candidates((4, 8), (1, 2)),
    "scan_fp32": _candidates((4, 8)),
    **{name: _candidates((4, 8)) for name in ("fwd", "bwd_v", "bwd_qk")},
    **{name: _candidates((4, 8, 16)) for name in ("fwd_fp32", "bwd_v_fp32", "bwd_qk_fp32")},
    "step": tuple(
        {"BV": BV, "num_warps": warps, "num_stages": 1} for BV in (16, 32, 64) for warps in (2, 4)
    ),
}
"""What `longaxon bench suite=tune` tries for the rows of conf/blocks/linear_attention.yaml."""


def settings(kernel: str, D_K: int, D_V: int, arch: Any, *, is_fp32: bool = False) -> Blocks:
    """Return the launch settings of a kernel; no block is wider than the heads."""
    name = f"{kernel}_fp32" if is_fp32 else kernel
    blocks = find_blocks("linear_attention", name, max(D_K, D_V), arch)
    for name, size in (("BK", D_K), ("BV", D_V)):
        widest = max(16, triton.next_power_of_2(size))
        blocks[name] = min(blocks.get(name, widest), widest)
    return blocks


def list_builds(arch: str) -> list[Build]:
    """Return every kernel for every dtype, head dim and kind of decay."""
    dtypes = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}
    decays = {"none": NONE, "scalar": SCALAR, "vector": VECTOR}
    cases = itertools.product(dtypes.items(), (32, 64, 128), decays.items())
    return [
        build
        for (dtype, dot), D, (name, decay) in cases
        for build in _build_case(arch, dtype, dot, D, name, decay.value)
    ]


def _build_case(arch: str, dtype: str, dot: tl.dtype, D: int, name: str, decay: int) -> list[Build]:
    state_type = "*bf16" if dtype == "bf16" else "*fp32"
    types = {"scale": "fp32", "p_g": "*fp32", "p_dg": "*fp32", "p_chunks": "*i32"}
    types |= {"p_states": state_type, "p_dstates": state_type, "p_state": "*fp32"}
    types |= {"p_offsets": "*i32", "p_initial": "*fp32", "p_final": "*fp32"}
    absent = {} if decay else {"p_g": None, "p_dg": None}
    sizes = {"D_K": D, "D_V": D, "DECAY": decay} | absent

    def build(kernel: Any, row: str, constants: dict[str, Any], suffix: str = "") -> Build:
        is_fp32 = dtype == "fp32" and row != "step"
        blocks = settings(row, D, D, arch, is_fp32=is_fp32)
        case = f"{dtype}-D{D}-{name}{suffix}"
        constants = {n: x for n, x in constants.items() if n in kernel.arg_names}
        return Build(kernel, case, dtype, constants, blocks, types)

    chunked = sizes | CHUNK | {"DOT": dot}
    scan = _linear_attention_scan_kernel
    return [
        build(scan, "scan", chunked | {"REVERSE": False}),
        build(scan, "scan", chunked | {"REVERSE": True}, "-reverse"),
        build(_linear_attention_fwd_kernel, "fwd", chunked),
        build(_linear_attention_bwd_v_kernel, "bwd_v", chunked),
        build(_linear_attention_bwd_qk_kernel, "bwd_qk", chunked),
        build(_linear_attention_step_kernel, "step", sizes),
    ]
