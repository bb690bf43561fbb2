"""Learning from a frozen teacher: mixers layer by layer, or the whole model by its logits.

Each is a module that stands in the student's place while it trains and returns its summed loss; in
evaluation it is the student itself.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from conf.schema import ModelConfig
from models.causal_lm import CausalLM, Layer, layer_list
from parallel.sequence import SequenceContext

Charge = Callable[[str], AbstractContextManager[None]]
"""Charges the time spent inside to a kind of layer."""

EPS = 1e-8
"""Added to the mean square of a teacher's output, which may be 0."""


class Lesson(nn.Module, ABC):
    """A student that trains beside its teacher.

    Args:
        student: takes the gradients.
        teacher: stays as it is; DeepSpeed and checkpoints do not see it.
        charge: told whose time it is.
        figures: names of what `sums` holds.
    """

    prefix = ""
    """Of the figures in metrics.jsonl."""

    def __init__(
        self, student: CausalLM, teacher: CausalLM, charge: Charge, figures: Sequence[str]
    ) -> None:
        super().__init__()
        self.student = student
        self._teacher = (teacher.requires_grad_(False).eval(),)  # no submodule of this one
        self.charge, self.figures = charge, tuple(figures)
        device = next(teacher.parameters()).device
        self.sums = torch.zeros(len(self.figures), dtype=torch.float64, device=device)
        """Of the tokens that counted since they were taken."""

    @property
    def teacher(self) -> CausalLM:
        return self._teacher[0]

    def learning_layers(self) -> list[Layer]:
        """Return the student's layers whose mixers a training step runs and differentiates."""
        return [layer for _, layer in self.student.named_layers()]

    def known_layers(self) -> list[Layer]:
        """Return the teacher's layers whose mixers a training step runs."""
        return [layer for _, layer in self.teacher.named_layers()]

    def take(self) -> torch.Tensor:
        """Return what was summed, and begin anew."""
        sums = self.sums.clone()
        self.sums.zero_()
        return sums

    def metrics(self, means: torch.Tensor) -> dict[str, float]:
        """Return what metrics.jsonl says of a step, from the sums over the tokens that counted."""
        return {
            f"{self.prefix}{name}": mean
            for name, mean in zip(self.figures, means.tolist(), strict=True)
        }

    def forward(
        self, tokens: torch.Tensor, labels: torch.Tensor, context: SequenceContext
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the summed loss (float32) and the number of labels that count (int64)."""
        if self.student.training:
            return self.teach(tokens, labels, context)
        loss_sum, num_valid = self.student(tokens, labels, context)
        return loss_sum, num_valid

    @abstractmethod
    def teach(
        self, tokens: torch.Tensor, labels: torch.Tensor, context: SequenceContext
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the summed loss of training and the number of labels that count."""


class AttentionTransfer(Lesson):
    """Each mixer that differs from the teacher's learns its output (arXiv:2410.10254), of those
    that have parameters to train.

    In layer l both mixers read the same input, the teacher's, of which they make s and y. Of a
    token whose label counts, the loss is the mean over these layers of

        mean((s - y)^2) / (mean(y^2) + EPS)

    over the channels: 1 for a mixer that gives zeros, however large y is in its layer. No gradient
    leaves a layer, so each layer's are computed at once and its activations freed.
    """

    prefix = "transfer/"

    def __init__(self, student: CausalLM, teacher: CausalLM, charge: Charge) -> None:
        learning = {
            name
            for name, layer in student.named_layers()
            if any(p.requires_grad for p in layer.mixer.parameters())
        }
        differing = differing_layers(student.config, teacher.config)
        self.layers = [name for name in differing if name in learning]
        super().__init__(student, teacher, charge, self.layers)

    def learning_layers(self) -> list[Layer]:
        return [layer for name, layer in self.student.named_layers() if name in self.layers]

    def known_layers(self) -> list[Layer]:
        known = dict(self.teacher.named_layers())
        return list(known.values())[: list(known).index(self.layers[-1]) + 1]

    def teach(
        self, tokens: torch.Tensor, labels: torch.Tensor, context: SequenceContext
    ) -> tuple[torch.Tensor, torch.Tensor]:
        counts = labels >= 0
        students = dict(self.student.named_layers())
        losses: list[torch.Tensor] = []
        gradients: dict[nn.Parameter, torch.Tensor] = {}
        with torch.no_grad():
            x, context = self.teacher.begin(tokens, context)
        for name, layer in self.teacher.named_layers():
            here = context.at(layer=name)
            with torch.no_grad(), self.charge("teacher"):
                normed = layer.mixer_norm(x)
                target = layer.mixer(normed, here)
            if name in self.layers:
                mixer = students[name].mixer
                with self.charge(mixer.kind):
                    # Not called, for hooks would expect a gradient of what it reads.
                    out = mixer.forward(normed, here)
                    error = relative_error(context.split(out)[1], context.split(target)[1])
                    loss = (error * counts).sum() / len(self.layers)
                    trained = [p for p in mixer.parameters() if p.requires_grad]
                    grads = torch.autograd.grad(loss, trained, materialize_grads=True)
                losses.append(loss.detach())
                gradients |= zip(trained, grads, strict=True)
                if len(losses) == len(self.layers):
                    break
            with torch.no_grad(), self.charge("teacher"):
                x = layer.add_ffn(x, target, here)
        of_layers = torch.stack(losses)
        self.sums += of_layers.double() * len(losses)
        mean = _WithGradients.apply(of_layers.sum(), [*gradients.values()], *gradients)
        return mean, counts.sum()


class Distillation(Lesson):
    """(1 - share) cross entropy + share T^2 KL(teacher || student), see `linear_distillation`."""

    def __init__(
        self,
        student: CausalLM,
        teacher: CausalLM,
        charge: Charge,
        *,
        share: float,
        temperature: float,
    ) -> None:
        super().__init__(student, teacher, charge, ("cross_entropy", "kl"))
        self.share, self.temperature = share, temperature

    def teach(
        self, tokens: torch.Tensor, labels: torch.Tensor, context: SequenceContext
    ) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad(), self.charge("teacher"):
            known = self.teacher.hidden(tokens, context)
        hidden = self.student.hidden(tokens, context)
        with self.charge("head_and_loss"):  # its gradients come with the forward pass
            loss_sum, cross_entropy, kl, num_valid = self.student.head.distill(
                hidden,
                labels,
                self.teacher.head,
                known,
                share=self.share,
                temperature=self.temperature,
            )
        self.sums += torch.stack([cross_entropy, kl]).double()
        return loss_sum, num_valid


def differing_layers(student: ModelConfig, teacher: ModelConfig) -> list[str]:
    """Return the names of the layers whose mixers are not the teacher's, by their settings."""
    layers = zip(layer_list(student), layer_list(teacher), strict=False)
    return [
        f"layers.{i}"
        for i, (new, old) in enumerate(layers)
        if [student.mixers[n] for n in new.mixers] != [teacher.mixers[n] for n in old.mixers]
    ]


def relative_error(out: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the squared error of each token over a mean square, float32 [1, T] of [1, T, E]."""
    target = target.float()
    square = (out.float() - target).square().mean(-1)
    return square / (target.square().mean(-1) + EPS)


class _WithGradients(torch.autograd.Function):
    """A loss whose gradients were computed already."""

    @staticmethod
    def forward(
        ctx: Any, loss: torch.Tensor, gradients: list[torch.Tensor], *parameters: torch.Tensor
    ) -> torch.Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradients = ctx.gradients
        return None, None, *(gradients.pop(0) * dloss for _ in range(len(gradients)))
