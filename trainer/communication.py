"""The ledger as rows of the report: bytes sent beside bytes predicted, and seconds waited."""

from typing import Any

_FIGURES = (
    "calls_per_step", "bytes_per_step", "predicted_bytes_per_step", "seconds_per_step",
    "calls", "bytes", "predicted_bytes", "all_ranks",
)  # fmt: skip
_AXES = ("ulysses", "ring", "sp", "ep", "pp", "dp", "edp", "world", "start", "checkpoint")
_BETWEEN_STEPS = ("start", "checkpoint")


def communication_table(
    comm: dict[str, Any] | None, step_seconds: float | None
) -> list[dict[str, Any]] | None:
    """Return one row for each axis, collective and kind of layer in comm.json.

    Beside the figures of the ledger, a row has `step_share`, seconds waited over the seconds of a
    step, None for what is sent before the first one and for checkpoints, which are written between
    steps; `as_predicted`, whether every rank sent the bytes of its formula, None where there is
    none; and `deviation`, by how much rank 0 did not, as a part of the prediction. A figure that
    comm.json lacks is None.
    """
    if comm is None:
        return None
    rows = []
    for axis in sorted(comm, key=lambda name: _AXES.index(name) if name in _AXES else len(_AXES)):
        for collective, whole in comm[axis].items():
            for kind, use in (whole.get("by_kind") or {None: whole}).items():
                row = {"axis": axis, "collective": collective, "kind": kind}
                row |= {name: use.get(name) for name in _FIGURES}
                seconds = row["seconds_per_step"]
                share = None
                if seconds is not None and step_seconds and axis not in _BETWEEN_STEPS:
                    share = seconds / step_seconds
                rows.append(row | {"step_share": share} | _compare(row))
    return rows


def _compare(row: dict[str, Any]) -> dict[str, Any]:
    sent, predicted = row["bytes"], row["predicted_bytes"]
    if predicted is None:
        return {"as_predicted": None, "deviation": None}
    together = row["all_ranks"] or {}
    is_equal = together.get("bytes") == together.get("predicted_bytes")
    return {
        "as_predicted": sent == predicted and is_equal and not together.get("ranks_off"),
        "deviation": (sent - predicted) / predicted if predicted else None,
    }
