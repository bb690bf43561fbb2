"""Launch settings of the attention kernels worth trying, and every combination that ships."""

import itertools

import triton.language as tl

from ops.attention.triton_backward import (
    _attention_bwd_delta_kernel,
    _attention_bwd_keys_kernel,
    _attention_bwd_queries_kernel,
)
from ops.attention.triton_forward import _attention_fwd_kernel
from ops.attention.triton_merge import _merge_bwd_kernel, _merge_fwd_kernel
from ops.attention.triton_visibility import TABLE_BLOCK, _attention_table_kernel
from ops.triton_build import Build
from ops.triton_runtime import Blocks, find_blocks

_DTYPES = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}
_HEAD_DIMS = (32, 64, 128)
_FLOATS = ("p_lse", "p_dlse", "p_delta", "p_other_lse", "p_merged_lse", "p_dmerged_lse")
_TYPES = {
    **dict.fromkeys((*_FLOATS, "p_dother_lse"), "*fp32"),
    **dict.fromkeys(("p_table", "p_starts", "p_ends"), "*i32"),
    "scale": "fp32",
}
_KERNELS = {
    "attention_fwd": _attention_fwd_kernel,
    "attention_bwd_keys": _attention_bwd_keys_kernel,
    "attention_bwd_queries": _attention_bwd_queries_kernel,
}


def _list_tiles(*tiles: tuple[int, int, int, int]) -> tuple[Blocks, ...]:
    names = ("BLOCK_Q", "BLOCK_K", "num_warps", "num_stages")
    return tuple(dict(zip(names, tile, strict=True)) for tile in tiles)


def _list_rows(name: str) -> tuple[Blocks, ...]:
    return tuple(
        {name: rows, "num_warps": warps, "num_stages": 1}
        for rows, warps in ((16, 2), (32, 4), (64, 4), (64, 8), (128, 8))
    )


_FP32_TILES = _list_tiles(
    (64, 64, 8, 1), (64, 32, 8, 1), (32, 64, 8, 1), (32, 32, 8, 1), (32, 32, 4, 1), (16, 16, 4, 1)
)
SEARCH: dict[str, tuple[Blocks, ...]] = {
    "attention_fwd": _list_tiles(
        (128, 128, 8, 2),
        (128, 64, 8, 2),
        (128, 64, 8, 3),
        (128, 64, 4, 2),
        (128, 64, 4, 3),
        (128, 32, 8, 1),
        (64, 64, 4, 2),
        (64, 32, 4, 1),
    ),
    "attention_bwd_keys": _list_tiles(
        (64, 128, 8, 2),
        (64, 128, 8, 3),
        (32, 128, 8, 1),
        (32, 128, 8, 2),
        (64, 64, 4, 1),
        (64, 64, 4, 2),
        (32, 64, 4, 1),
        (32, 64, 4, 2),
    ),
    "attention_bwd_queries": _list_tiles(
        (128, 64, 8, 2),
        (128, 64, 8, 3),
        (128, 32, 8, 1),
        (128, 32, 8, 2),
        (64, 64, 4, 1),
        (64, 64, 4, 2),
        (64, 32, 4, 1),
        (64, 32, 4, 2),
    ),
    "attention_fwd_fp32": _FP32_TILES,
    "attention_bwd_keys_fp32": _FP32_TILES,
    "attention_bwd_queries_fp32": _FP32_TILES,
    "attention_bwd_delta": _list_rows("BLOCK_Q"),
    "merge_fwd": _list_rows("BLOCK_T"),
    "merge_bwd": _list_rows("BLOCK_T"),
}
"""Settings worth trying for each kernel of conf/blocks/attention.yaml."""


def list_builds(arch: str) -> list[Build]:
    """Return every kernel for every dtype and head dim."""
    blocks = {"BLOCK": TABLE_BLOCK, "num_warps": 4, "num_stages": 1}
    builds = [
        Build(_attention_table_kernel, case, "i32", absent, blocks, _TYPES)
        for case, absent in (("rows", {"p_starts": None, "p_ends": None}), ("documents", {}))
    ]
    for dtype, D in itertools.product(_DTYPES, _HEAD_DIMS):
        builds += _list_attention(arch, dtype, D) + _list_merges(arch, dtype, D)
    return builds


def _list_attention(arch: str, dtype: str, D: int) -> list[Build]:
    case, sizes = f"{dtype}-D{D}", {"D": D, "BLOCK_D": D}
    builds = []
    for name, kernel in _KERNELS.items():
        row = f"{name}_fp32" if dtype == "fp32" else name
        blocks = find_blocks("attention", row, D, arch)
        constants = {**sizes, "DOT": _DTYPES[dtype]}
        builds.append(Build(kernel, case, dtype, constants, blocks, _TYPES))
    blocks = find_blocks("attention", "attention_bwd_delta", D, arch)
    for suffix, absent in (("", {}), ("-out-alone", {"p_dlse": None})):
        constants = {**sizes, **absent}
        builds.append(
            Build(_attention_bwd_delta_kernel, case + suffix, dtype, constants, blocks, _TYPES)
        )
    return builds


def _list_merges(arch: str, dtype: str, D: int) -> list[Build]:
    """List merges into a result of the same dtype, and into one of float32."""
    builds = []
    for first in sorted({dtype, "fp32"}):
        wide = dict.fromkeys(("p_out", "p_merged", "p_dmerged", "p_dout"), f"*{first}")
        for name, kernel in (("merge_fwd", _merge_fwd_kernel), ("merge_bwd", _merge_bwd_kernel)):
            blocks = find_blocks("attention", name, D, arch)
            constants = {"D": D, "BLOCK_D": D}
            case = f"{dtype}-into-{first}-D{D}"
            builds.append(Build(kernel, case, dtype, constants, blocks, _TYPES | wide))
    return builds
