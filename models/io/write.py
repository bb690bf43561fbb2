"""How a model of ours is written so that others read it: names of tensors, and config.json."""

from dataclasses import dataclass
from typing import Any, Literal

from conf.schema import ModelConfig
from models.io import gla_swa, transformers_config
from models.io.compare import differences
from models.io.names import GLA_SWA, TRANSFORMERS, Naming
from models.io.read import parameter_shapes, read_config

Format = Literal["auto", "huggingface", "gla_swa", "longaxon"]
_WRITERS = {
    "huggingface": (transformers_config.write_config, TRANSFORMERS),
    gla_swa.MODEL_TYPE: (gla_swa.write_config, GLA_SWA),
}
_IDS = {"bos_token_id", "eos_token_id", "pad_token_id"}


@dataclass(frozen=True)
class ExportPlan:
    """How a model is written.

    Attributes:
        format: huggingface, gla_swa or longaxon.
        names: their names of all parameters by ours, in the model's order.
        values: config.json; None for our own format.
        reasons: why each other format that was asked for cannot express the model.
    """

    format: str
    names: dict[str, str]
    values: dict[str, Any] | None
    reasons: list[str]


def plan_export(
    config: ModelConfig,
    format: Format,
    *,
    is_spiking: bool,
    seq_len: int,
    source: dict[str, Any] | None = None,
) -> ExportPlan:
    """Choose the first of Hugging Face's families, gla_swa and our own format that fits.

    Args:
        format: the only one to try; auto: all.
        is_spiking: whether the model spikes, which only gla_swa leaves to who loads it.
        seq_len: tokens of the sequences it was trained on.
        source: config.json of the checkpoint that the model was made of, or the ids of special
            tokens alone. If the architecture is still the same, it is written as it was.

    Raises:
        ValueError: the format cannot express the model; lists why.
    """
    reasons: list[str] = []
    for name in _WRITERS if format == "auto" else (format,):
        if name not in _WRITERS:
            continue
        values, why = _describe(config, name, seq_len, source)
        if is_spiking and name == "huggingface":
            why.append("it spikes, which no family there does")
        if values is not None and not why:
            naming = _WRITERS[name][1]
            return ExportPlan(name, naming.translate(parameter_shapes(config)), values, reasons)
        reasons.append(f"{name} cannot express the model: {'; '.join(why)}")
    if format not in ("auto", "longaxon"):
        raise ValueError(f"format={format}: {reasons[0]}; format=longaxon can")
    return ExportPlan("longaxon", {n: n for n in parameter_shapes(config)}, None, reasons)


def _describe(
    config: ModelConfig, name: str, seq_len: int, source: dict[str, Any] | None
) -> tuple[dict[str, Any] | None, list[str]]:
    """Return the config.json of a format, and what of the model it cannot express."""
    write, naming = _WRITERS[name]
    longest = (source or {}).get("max_position_embeddings") or 0
    if source is not None and longest >= seq_len and _describes(source, config, naming):
        return source, []
    try:
        values = write(config, max(longest, seq_len))
        after, _ = read_config(values)
    except ValueError as error:
        return None, [str(error)]
    ids = {key: source[key] for key in _IDS & values.keys() if source and key in source}
    family = values["model_type"]
    return values | ids, [f"as {family}, {why}" for why in differences(config, after)]


def _describes(values: dict[str, Any], config: ModelConfig, naming: Naming) -> bool:
    """Return whether a config.json is that of a model, written with these names."""
    try:
        described, names = read_config(values)
    except ValueError:  # It may be anybody's, beside a tokenizer.
        return False
    return names is naming and not differences(config, described)
