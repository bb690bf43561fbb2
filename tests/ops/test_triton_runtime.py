"""Launch settings: the nearest architecture, the next size, what a search tries."""

import pytest
import torch

import ops.triton_runtime
from ops.catalog import OPERATORS
from ops.triton_runtime import arch_of, dot_dtype, explain_absence, find_blocks, trying

SETTINGS = {
    "fwd": {
        "default": {32: {"BLOCK": 1}, 128: {"BLOCK": 2}},
        "amd": {64: {"BLOCK": 3}},
        "sm_90": {64: {"BLOCK": 4}},
    },
    "bwd": {"sm_90": {64: {"BLOCK": 5}}},
}


@pytest.fixture(autouse=True)
def _settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops.triton_runtime, "_read_settings", lambda op: SETTINGS)


@pytest.mark.parametrize(
    ("arch", "size", "block"),
    [
        ("sm_80", 16, 1),
        ("sm_80", 32, 1),
        ("sm_80", 33, 2),
        ("sm_80", 500, 2),
        ("interpreter", 64, 2),
        ("gfx942", 32, 3),
        ("gfx90a", 128, 3),
        ("sm_90", 64, 4),
    ],
)
def test_settings_come_from_the_nearest_architecture_and_size(
    arch: str, size: int, block: int
) -> None:
    assert find_blocks("op", "fwd", size, arch) == {"BLOCK": block}


def test_a_device_stands_for_its_architecture() -> None:
    assert arch_of(torch.device("cpu")) == "interpreter"
    assert find_blocks("op", "fwd", 32, torch.device("cpu")) == {"BLOCK": 1}


def test_a_kernel_without_a_row_is_named() -> None:
    with pytest.raises(ValueError, match=r"blocks/op.yaml has no row for bwd on gfx942"):
        find_blocks("op", "bwd", 64, "gfx942")


def test_a_search_replaces_the_row_of_one_size_for_a_while() -> None:
    with trying("op", "fwd", 32, {"BLOCK": 9}):
        assert find_blocks("op", "fwd", 20, "sm_80") == {"BLOCK": 9}
        assert find_blocks("op", "fwd", 64, "sm_80") == {"BLOCK": 2}
        assert find_blocks("other", "fwd", 20, "sm_80") == {"BLOCK": 1}
    assert find_blocks("op", "fwd", 20, "sm_80") == {"BLOCK": 1}


def test_what_is_found_can_be_changed() -> None:
    find_blocks("op", "fwd", 32, "sm_80")["BLOCK"] = 7
    assert find_blocks("op", "fwd", 32, "sm_80") == {"BLOCK": 1}


def test_products_are_float32_in_the_interpreter() -> None:
    assert str(dot_dtype(torch.ones(1, dtype=torch.bfloat16))) == "fp32"


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the GPU here")
def test_the_interpreter_is_for_those_who_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    assert explain_absence("cpu") is None
    monkeypatch.setattr(ops.triton_runtime.triton.knobs.runtime, "interpret", False)
    assert "TRITON_INTERPRET=1" in str(explain_absence("cpu"))
    assert explain_absence("cuda") is None


def test_every_operator_has_a_triton_implementation() -> None:
    for op, table in OPERATORS.items():
        assert "triton" in [row.name for row in table], op
