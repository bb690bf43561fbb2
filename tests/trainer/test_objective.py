"""Objectives and stages that cannot be had are refused; the experiments' can."""

import dataclasses
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import TINY, build_model, compose_config
from helpers.smollm2 import require_smollm2
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from cluster.accelerators import load_accelerator
from conf.schema import Config, ModelConfig, ObjectiveConfig, SpikeConfig
from models.causal_lm import CausalLM
from models.io import read_foreign
from models.teaching import AttentionTransfer, Distillation
from trainer.checks import check_config
from trainer.checks_objective import check_objective
from trainer.flops import FlopCounter
from trainer.objective import StepFlops
from trainer.stages import Stage, plan_stages, planned_models

HYBRID = (*TINY, "model.vocab_size=264", "data.micro_batch_size=1")
FULL = "model.layers=[{mixers:[full],ffn:dense}]"
MOE = "+moe@model.ffns.dense.moe=top1_shared"


def check(*overrides: str, teacher: tuple[str, ...] = (FULL,), world_size: int = 1) -> None:
    """Check the objective of a tiny hybrid whose teacher has full attention."""
    config = compose_config(*HYBRID, *overrides)
    later = {"base": compose_config(*HYBRID, *teacher).model}
    check_objective(config, world_size, later)


@pytest.mark.parametrize("kind", ["attention_transfer", "distillation"])
def test_objectives_fit_data_and_sequence_ranks(kind: str) -> None:
    settings = (f"objective={kind}", "objective.teacher=base", "launcher=ray")
    check(*settings, "parallel.ulysses=2", "parallel.ring=2", "parallel.zero_stage=2", world_size=8)


@pytest.mark.parametrize(
    ("overrides", "teacher", "message"),
    [
        (("parallel.pp=2",), (FULL,), "parallel.pp=2: objective.kind=attention_transfer needs"),
        (("parallel.zero_stage=3",), (FULL,), "parallel.zero_stage=3: .* needs 2 at most"),
        ((), (FULL, "model.vocab_size=300"), "has vocab_size=300, the model 264"),
        ((), (FULL, "model.num_layers=4"), "has num_layers=4, the model 3"),
        ((), (FULL, "model.num_sinks=2"), "has num_sinks=2, the model 0"),
        ((), (), "has the mixers of the model in every layer"),
        ((MOE,), (FULL,), "trains mixers alone, and model.layers has experts"),
        (("objective.train=ffn",), (FULL,), "no parameter is left to train"),
        (("parallel.ulysses=3", "launcher=ray"), (FULL,), "must divide the 2 ranks"),
    ],
)
def test_transfer_that_cannot_be_is_refused(
    overrides: tuple[str, ...], teacher: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check(
            "objective=attention_transfer", "objective.teacher=base", *overrides, teacher=teacher,
            world_size=2,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "distillation"}, "kind=distillation needs a teacher"),
        ({"teacher": "base"}, "teacher=base teaches nothing with kind=next_token"),
        ({"train": "(mixer"}, "is no regular expression"),
    ],
)
def test_objectives_that_contradict_themselves_are_refused(
    values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ObjectiveConfig(**values)


def compose_stages(*overrides: str) -> list[Stage]:
    """Return the stages of a chain that would be in `runs/chain`."""
    with initialize_config_module("conf", version_base="1.3"):
        config = compose("train", overrides=list(overrides))
    tree = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(tree, dict)
    return plan_stages({str(key): value for key, value in tree.items()}, Path("runs/chain"))


def check_stages(stages: list[Stage], base: ModelConfig, world_size: int) -> None:
    """Check every stage that trains, on ranks that are not there, with bytes for a tokenizer."""
    accelerator = load_accelerator("cpu")
    later = {str(stages[0].config.run.init_from): base}
    for i, stage in enumerate(stages):
        if stage.convert is None:
            data = dataclasses.replace(stage.config.data, tokenizer="bytes", chat_template="chatml")
            config: Config = dataclasses.replace(stage.config, data=data, dtype="float32")
            check_config(config, accelerator, world_size, later=later | planned_models(stages[:i]))


def test_experiment_of_the_7b_composes_in_full_size(tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text(
        '{"text": "axon", "prompt": "axon?", "response": "spike"}\n'
    )
    paths = [
        f"{key}={tmp_path / 'text.jsonl'}"
        for key in ("data.path", *(
            f"stages.{name}.data.path"
            for name in (
                "context_32k", "context_128k", "sft_general", "sft_dialogue", "sft_reasoning"
            )
        ))
    ]  # fmt: skip
    stages = compose_stages("experiment=spikingbrain_7b", "run.init_from=qwen", *paths)
    check_stages(stages, compose_config("model=qwen2_5_7b").model, world_size=256)
    lengths = {stage.name: stage.config.data.seq_len for stage in stages}
    tokens = {
        stage.name: lengths[stage.name]
        * stage.config.data.global_batch_size
        * stage.config.run.steps
        for stage in stages
    }
    for name, seq_len, billions in (
        ("context_8k", 8192, 100), ("context_32k", 32768, 20), ("context_128k", 131072, 20)
    ):  # fmt: skip
        assert lengths[name] == seq_len
        assert tokens[name] == pytest.approx(billions * 1e9, rel=1e-3)
    assert [stage.name for stage in stages[-3:]] == ["sft_general", "sft_dialogue", "sft_reasoning"]
    assert stages[0].convert is not None
    assert stages[0].convert.source == "qwen"


def test_experiment_on_a_laptop_composes_with_stages_put_in_and_left_out() -> None:
    base = require_smollm2()
    stages = compose_stages(
        "experiment=convert_smollm2", "+stage@stages.spike=spike",
        "stages.spike.objective.teacher=distill", "+stage@stages.sft=sft",
        "stages.sft.data.path=chats.jsonl", "stages.context_2k=null", "data.tokenizer=bytes",
    )  # fmt: skip
    assert [stage.folder.name for stage in stages] == [
        "01-teacher", "02-convert", "03-transfer", "04-distill", "05-spike", "06-sft"
    ]  # fmt: skip
    assert [stage.config.run.init_from for stage in stages] == [
        base, *(f"runs/chain/{stage.folder.name}" for stage in stages[:-1])
    ]  # fmt: skip
    teacher = stages[0].config.model
    assert teacher == dataclasses.replace(read_foreign(base).config, num_sinks=1)
    assert {stage.config.objective.teacher for stage in stages[2:4]} == {"runs/chain/01-teacher"}
    check_stages(stages[:-2], teacher, world_size=1)
    spiking = stages[-2].config
    with torch.device("meta"):
        CausalLM(spiking.model, spiking.spike, spiking.ops)  # refuses patterns without a match
    assert spiking.objective.teacher == "runs/chain/04-distill"
    assert stages[-1].config.data.source == "chat"
    assert not stages[-1].config.spike.enabled


def test_names_of_earlier_stages_stand_for_their_runs() -> None:
    stages = compose_stages(
        "run.name=x", "+stages.one={run:{steps:10}}",
        "+stages.two={objective:{kind:distillation,teacher:one},run:{init_from:null}}",
    )  # fmt: skip
    assert stages[1].config.objective.teacher == "runs/chain/01-one"
    assert stages[1].config.run.init_from is None
    assert stages[1].config.spike == SpikeConfig(enabled=False, k=3.0)


def test_teacher_counts_as_hardware_alone() -> None:
    student, teacher = (
        build_model(compose_config(*HYBRID, *layers).model) for layers in ((), (FULL,))
    )
    counter, lengths = FlopCounter(student), [7, 20]
    plain, spent = counter.training(lengths), counter.training(lengths, hardware=True)
    known = sum(FlopCounter(teacher).training(lengths).values()) / 3
    settings = {"share": 0.5, "temperature": 1.0}

    distillation = StepFlops(counter, Distillation(student, teacher, nullcontext, **settings))
    assert distillation.model(lengths) == plain
    assert distillation.hardware(lengths) == pytest.approx(sum(spent.values()) + known)

    # All mixers differ; of the teacher neither the head nor the last FFN is needed.
    transfer = StepFlops(counter, AttentionTransfer(student, teacher, nullcontext))
    mixers = {kind: flops for kind, flops in plain.items() if kind not in ("ffn", "head_and_loss")}
    assert {kind: n for kind, n in transfer.model(lengths).items() if n} == mixers
    own = sum(spent[kind] for kind in mixers)
    unneeded = plain["head_and_loss"] / 3 + plain["ffn"] / 3 / 3
    assert transfer.hardware(lengths) == pytest.approx(own + known - unneeded)
