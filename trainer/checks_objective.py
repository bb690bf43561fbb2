"""Which objectives suit the model, its teacher and the ranks."""

import dataclasses
import itertools
from collections.abc import Mapping

import torch

from conf.schema import Config, ModelConfig
from models.causal_lm import CausalLM, layer_list
from models.teaching import differing_layers
from trainer.checks_parallel import check_parallel
from trainer.objective import read_teacher, trained_names


def check_objective(config: Config, world_size: int, later: Mapping[str, ModelConfig]) -> None:
    """Refuse an objective that cannot be had.

    Args:
        config: of the run.
        world_size: its ranks.
        later: models of runs that will have been made when this one starts, by run directory.

    Raises:
        ValueError: names the key, its value, what is required and a value that would work.
    """
    objective, parallel = config.objective, config.parallel
    reasons = {
        f"objective.kind={objective.kind}": objective.teacher is not None,
        f"objective.train={objective.train!r}": objective.train is not None,
        "adapters": config.adapters is not None,
    }
    reason = next((key for key, holds in reasons.items() if holds), None)
    if reason is None:
        return
    if parallel.pp > 1:
        raise ValueError(f"parallel.pp={parallel.pp}: {reason} needs parallel.pp=1")
    if parallel.zero_stage == 3:
        raise ValueError(
            f"parallel.zero_stage=3: {reason} leaves parameters as they are, which needs 2 at most"
        )
    teacher = None
    if objective.teacher is not None:
        teacher = later.get(objective.teacher) or read_teacher(objective.teacher)[0]
        _check_teacher(config, teacher)
        check_parallel(_without_experts(config, teacher), world_size)
    with torch.device("meta"):
        model = CausalLM(config.model, config.spike, config.ops, adapters=config.adapters)
    if not trained_names(model, config, teacher):
        raise ValueError(
            f"{reason}: no parameter is left to train; their names are like "
            f"{', '.join(name for name, _ in itertools.islice(model.named_parameters(), 3))}; "
            "objective.train=null trains all that objective.kind concerns"
        )


def _check_teacher(config: Config, teacher: ModelConfig) -> None:
    student, objective = config.model, config.objective
    name = f"objective.teacher={objective.teacher}"
    keys = ["vocab_size"]
    if objective.kind == "attention_transfer":
        keys += ["hidden_size", "num_layers", "num_sinks"]
    for key in keys:
        mine, known = getattr(student, key), getattr(teacher, key)
        if mine != known:
            raise ValueError(
                f"{name} has {key}={known}, the model {mine}; objective.kind={objective.kind} "
                f"needs the same, so use model.{key}={known}"
            )
    if config.parallel.ep > 1 and _has_experts(teacher):
        raise ValueError(
            f"parallel.ep={config.parallel.ep}: {name} has experts, which ranks cannot share out; "
            "use parallel.ep=1"
        )
    if objective.kind != "attention_transfer":
        return
    if _has_experts(student):
        raise ValueError(
            "objective.kind=attention_transfer trains mixers alone, and model.layers has experts; "
            "transfer before the FFNs become experts"
        )
    if not differing_layers(student, teacher):
        raise ValueError(
            f"{name} has the mixers of the model in every layer, so that there is nothing to "
            "transfer; use objective=next_token or distillation"
        )


def _without_experts(config: Config, model: ModelConfig) -> Config:
    """Return the config of `model` on the same ranks."""
    off = {"ep": 1, "moe_recompute": "none", "recompute_above": None, "hot_experts": 0}
    parallel = dataclasses.replace(config.parallel, **off)  # type: ignore[arg-type]
    return dataclasses.replace(config, model=model, parallel=parallel)


def _has_experts(model: ModelConfig) -> bool:
    return any(model.ffns[layer.ffn].moe is not None for layer in layer_list(model))
