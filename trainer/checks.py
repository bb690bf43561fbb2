"""Checks across sections of a config, all made before any process or device is touched."""

import math
from collections.abc import Mapping

import torch

from conf.schema import Config, ModelConfig
from models.causal_lm import CausalLM
from ops.catalog import OPERATORS
from ops.registry import explain
from trainer.accelerator import Accelerator
from trainer.checkpoint import resolve
from trainer.checks_objective import check_objective
from trainer.checks_parallel import check_parallel
from trainer.data import check_data, load_tokenizer
from trainer.restore import has_integers


def check_config(
    config: Config,
    accelerator: Accelerator,
    world_size: int,
    *,
    later: Mapping[str, ModelConfig] | None = None,
) -> None:
    """Refuse what cannot run on `world_size` ranks of `accelerator`.

    Args:
        later: models of runs that will have been made when this one starts, by run directory.

    Raises:
        ValueError: names the key, its value, what is required and a value that would work.
    """
    if config.quantization is not None:
        raise ValueError(
            "quantization is set, and weights in INT8 cannot be trained; use quantization=null"
        )
    check_model(config)
    _check_spikes(config)
    check_parallel(config, world_size)
    _check_optim(config)
    _check_device(config, accelerator)
    _check_starts(config, later or {})
    check_objective(config, world_size, later or {})
    check_data(config.data)
    tokenizer = load_tokenizer(config.data.tokenizer)
    if config.model.vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"model.vocab_size={config.model.vocab_size} is below the {tokenizer.vocab_size} "
            f"tokens of data.tokenizer={config.data.tokenizer}; use "
            f"model.vocab_size={math.ceil(tokenizer.vocab_size / 8) * 8}"
        )


def check_model(config: Config) -> None:
    """Refuse layers that name mixers or FFNs that are not there."""
    model = config.model
    for i, layer in enumerate(model.layers):
        for name in layer.mixers:
            if name not in model.mixers:
                raise ValueError(
                    f"model.layers[{i}].mixers names {name!r}, which model.mixers does not define; "
                    f"it defines {', '.join(model.mixers) or 'none'}"
                )
        if len(set(layer.mixers)) != len(layer.mixers):
            raise ValueError(f"model.layers[{i}].mixers={layer.mixers} names a mixer twice")
        if layer.ffn not in model.ffns:
            raise ValueError(
                f"model.layers[{i}].ffn={layer.ffn!r} is not in model.ffns; use one of "
                f"{', '.join(model.ffns) or 'none'}"
            )


def _check_spikes(config: Config) -> None:
    if config.spike.k_by_input:
        with torch.device("meta"):
            CausalLM(config.model, config.spike, config.ops)  # refuses patterns without a match
    has_experts = any(ffn.moe is not None for ffn in config.model.ffns.values())
    if config.spike.rate_weight and has_experts and config.model.num_sinks:
        raise ValueError(
            f"spike.rate_weight={config.spike.rate_weight} with experts and model.num_sinks="
            f"{config.model.num_sinks}: experts cannot tell the sinks of each rank from tokens; "
            "use spike.rate_weight=0 or model.num_sinks=0"
        )


def _check_optim(config: Config) -> None:
    optim, steps = config.optim, config.run.steps
    if optim.warmup_steps > steps:
        raise ValueError(
            f"optim.warmup_steps={optim.warmup_steps} exceeds run.steps={steps}; use "
            f"optim.warmup_steps={steps // 10}"
        )
    if optim.schedule == "wsd" and not 1 <= optim.decay_steps <= steps - optim.warmup_steps:
        raise ValueError(
            f"optim.decay_steps={optim.decay_steps}: optim.schedule=wsd needs 1 to "
            f"{steps - optim.warmup_steps} of the {steps} steps after the warm-up; use "
            f"optim.decay_steps={max(1, steps // 5)}"
        )


def _check_device(config: Config, accelerator: Accelerator) -> None:
    dtype = getattr(torch, config.dtype)
    reason = accelerator.unsupported(dtype)
    if reason:
        raise ValueError(f"dtype={config.dtype} on accelerator={accelerator.name}: {reason}")
    for op, table in OPERATORS.items():
        explain(op, table, accelerator.name, dtype, getattr(config.ops, op))


def _check_starts(config: Config, later: Mapping[str, ModelConfig]) -> None:
    for path in (config.run.resume, config.run.init_from):
        if path not in ("auto", "never", None, *later):
            checkpoint = resolve(str(path))
            if has_integers(checkpoint):
                raise ValueError(
                    f"{path} holds weights in INT8, which cannot be trained; name the run that it "
                    "was made from"
                )
