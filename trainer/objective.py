"""What a run minimises: which parameters train, who teaches, and what a step is said to cost."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from conf.schema import Config, ModelConfig, SpikeConfig
from models.causal_lm import CausalLM
from models.io import is_foreign, read_foreign
from models.moe import Routing
from models.teaching import AttentionTransfer, Charge, Distillation, Lesson, differing_layers
from trainer.flops import FlopCounter
from trainer.model_state import load_weights
from trainer.restore import config_of, find_run


def read_teacher(path: str) -> tuple[ModelConfig, SpikeConfig]:
    """Return what the model of a run, a checkpoint or a checkpoint of others is like.

    Raises:
        ValueError: there is none, or it is not sound.
    """
    if is_foreign(path):
        return read_foreign(path).config, SpikeConfig(enabled=False, k=1.0)
    config, _ = find_run(path)
    return config.model, config.spike


def load_teacher(config: Config, path: str, device: torch.device) -> CausalLM:
    """Return the frozen model of a checkpoint, or of others', matrices in the compute dtype."""
    foreign = read_foreign(path) if is_foreign(path) else None
    of_run = None if foreign is not None else config_of(Path(path))
    model, spike = read_teacher(path) if of_run is None else (of_run.model, of_run.spike)
    dtype = getattr(torch, config.dtype)
    teacher = CausalLM(model, spike, config.ops, dtype=dtype)
    for parameter in teacher.parameters():
        if parameter.dim() >= 2:  # each is cast to it before it multiplies; no memory is used yet
            parameter.data = parameter.data.to(dtype)
    if foreign is None:
        load_weights(teacher, Path(path))
    else:
        with torch.no_grad():
            for name, parameter in teacher.named_parameters():
                parameter.copy_(foreign.tensors.get(name))
    return teacher.to(device)


def build_lesson(
    config: Config, student: CausalLM, teacher: CausalLM | None, charge: Charge
) -> Lesson | None:
    """Return what trains in the student's place, if it has a teacher."""
    objective = config.objective
    if teacher is None:
        return None
    if objective.kind == "attention_transfer":
        return AttentionTransfer(student, teacher, charge)
    share, temperature = objective.weight, objective.temperature
    return Distillation(student, teacher, charge, share=share, temperature=temperature)


def freeze(model: CausalLM, config: Config, teacher: CausalLM | None) -> None:
    """Take the gradient from the parameters that `config` does not train."""
    trained = trained_names(model, config, None if teacher is None else teacher.config)
    for name, parameter in model.named_parameters():
        if name not in trained:
            parameter.requires_grad_(False)


def trained_names(model: CausalLM, config: Config, teacher: ModelConfig | None) -> set[str]:
    """Return the names of the parameters that are trained.

    Where there are adapters they are all that is, unless `objective.train` says otherwise.
    """
    objective = config.objective
    pattern = objective.train or (r"[.]adapter[.]" if config.adapters else "")
    taught: tuple[str, ...] = ("",)
    if objective.kind == "attention_transfer" and teacher is not None:
        taught = tuple(f"{name}.mixer." for name in differing_layers(model.config, teacher))
    names = (name for name, _ in model.named_parameters())
    return {name for name in names if re.search(pattern, name) and name.startswith(taught)}


class StepFlops:
    """FLOPs of a step: the model's are the student's own, the teacher's are hardware FLOPs.

    Of attention transfer the student has the mixers that learn, and the teacher what comes before
    the last output that it teaches. Of distillation both have all of theirs.
    """

    def __init__(self, student: FlopCounter, lesson: Lesson | None) -> None:
        self.student = student
        self.teacher = None if lesson is None else FlopCounter(lesson.teacher)
        if isinstance(lesson, AttentionTransfer):
            taught = [int(name.removeprefix("layers.")) for name in lesson.layers]
            self.student = student.part([], taught)
            self.teacher = FlopCounter(lesson.teacher).part(range(taught[-1]), taught[-1:])
        self.kinds = list(self.model([1]))

    def model(self, doc_lengths: Sequence[int]) -> dict[str, float]:
        """Return the model FLOPs over the documents, by kind of layer."""
        return self.student.training(doc_lengths)

    def hardware(self, doc_lengths: Sequence[int]) -> float:
        """Return all FLOPs over the documents, but for what depends on routers."""
        own = sum(self.student.training(doc_lengths, hardware=True).values())
        return own if self.teacher is None else own + self.teacher.forward(doc_lengths)

    def recomputed(self, routings: Mapping[str, Routing]) -> float:
        """Return the hardware FLOPs of what ran again since experts had many rows."""
        return self.student.recomputed(routings)
