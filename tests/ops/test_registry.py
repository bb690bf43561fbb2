"""The registry: the first implementation that fits, pins that hold, refusals that help."""

import logging
import re

import pytest
import torch

from ops.catalog import OPERATORS
from ops.registry import FLOATS, Implementation, choose, explain

TABLE = (
    Implementation("triton", "nowhere", ("cuda",), (torch.float32, torch.bfloat16)),
    Implementation("torch", "operator", None, (torch.float32, torch.float64)),
    Implementation("reference", "math", None, FLOATS),
)


@pytest.mark.parametrize(
    ("device", "dtype", "impl", "name"),
    [
        ("cuda", torch.bfloat16, None, "triton"),
        ("cuda", torch.float64, None, "torch"),
        ("cpu", torch.float32, None, "torch"),
        ("cpu", torch.float32, "auto", "torch"),
        ("npu", torch.float16, None, "reference"),
        ("cpu", torch.float32, "reference", "reference"),
        ("cuda", torch.float32, "torch", "torch"),
    ],
)
def test_first_row_that_fits_is_chosen_unless_pinned(
    device: str, dtype: torch.dtype, impl: str | None, name: str
) -> None:
    chosen, why = explain("op", TABLE, device, dtype, impl)
    assert chosen == name
    assert why == "pinned" if impl not in (None, "auto") else f"{dtype} on {device}" in why


@pytest.mark.parametrize(
    ("device", "dtype", "impl", "message"),
    [
        ("cpu", torch.float32, "triton", "ops.op=triton: needs a device of cuda, not cpu; what "
         "runs here: torch, reference"),
        ("cuda", torch.float16, "torch", "ops.op=torch: does not take torch.float16; what runs "
         "here: reference"),
        ("cpu", torch.float32, "fast", "ops.op=fast: no such implementation; there are triton, "
         "torch, reference"),
        ("cpu", torch.int32, None, "ops.op: nothing runs torch.int32 on cpu (triton: needs a "
         "device of cuda"),
    ],
)  # fmt: skip
def test_what_cannot_run_is_refused_with_what_can(
    device: str, dtype: torch.dtype, impl: str | None, message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        explain("op", TABLE, device, dtype, impl)


def test_the_chosen_function_is_imported_and_announced_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    x = torch.ones(1)
    with caplog.at_level(logging.INFO, logger="ops.registry"):
        assert choose("announced.pow", TABLE, x)(2, 3) == 8
        assert type(choose("announced.pow", TABLE, x, "reference")(2, 3)) is float
        choose("announced.pow", TABLE, x)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2
    assert lines[0].startswith("ops.announced: torch (first of torch, reference for torch.float32")
    assert lines[1] == "ops.announced: reference (pinned)"


def find_no_compiler(device: str) -> str:
    return f"needs a compiler for {device}"


def test_what_a_row_requires_of_the_machine_is_asked() -> None:
    vendor = Implementation("vendor", "nowhere", None, FLOATS, f"{__name__}:find_no_compiler")
    table = (vendor, *TABLE)
    assert explain("op", table, "cpu", torch.float32)[0] == "torch"
    with pytest.raises(
        ValueError, match=r"vendor: needs a compiler for cpu; what runs here: torch"
    ):
        explain("op", table, "cpu", torch.float32, "vendor")


def test_a_device_on_request_is_for_pins_alone() -> None:
    row = Implementation("triton", "nowhere", ("cuda",), FLOATS, on_request=("cpu",))
    assert explain("op", (row, *TABLE[1:]), "cpu", torch.float32)[0] == "torch"
    assert explain("op", (row, *TABLE[1:]), "cpu", torch.float32, "triton") == ("triton", "pinned")


@pytest.mark.parametrize("op", OPERATORS)
def test_every_operator_has_a_definition_and_a_portable_implementation(op: str) -> None:
    table = OPERATORS[op]
    rows = {row.name: row for row in table}
    assert len(rows) == len(table)
    assert {"torch", "reference"} <= rows.keys()
    for name in ("torch", "reference"):
        assert rows[name].devices is None
    assert torch.float64 in rows["reference"].dtypes
    assert explain(op, table, "cpu", torch.float64)[0] == "torch"
