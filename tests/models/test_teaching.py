"""Learning from a teacher: what is differentiated, on one rank and on several."""

from contextlib import nullcontext

import pytest
import torch
from helpers.assertions import assert_close
from helpers.models import build_model, one_rank_context, random_batch, tiny_model_config
from helpers.ranks import Setting, build_context, run_ranks

from models.causal_lm import CausalLM
from models.teaching import EPS, AttentionTransfer, Distillation, Lesson
from parallel.mesh import World

DOCUMENTS = (9, 14, 1, 8)
TEACHER = ("full", "window", "full")
STUDENT = ("linear", "window", "linear+window")


def build_lesson(kind: str, num_sinks: int = 0) -> Lesson:
    """Return a lesson of tiny models that have drawn different weights."""
    sinks = (f"model.num_sinks={num_sinks}",)
    teacher = build_model(tiny_model_config(*TEACHER, overrides=sinks), seed=1)
    student = build_model(tiny_model_config(*STUDENT, overrides=sinks), seed=2)
    if kind == "attention_transfer":
        return AttentionTransfer(student, teacher, lambda _: nullcontext())
    share, temperature = 0.25, 2.0
    return Distillation(
        student, teacher, lambda _: nullcontext(), share=share, temperature=temperature
    )


def gradients(model: CausalLM) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("num_sinks", [0, 3])
def test_transfer_has_the_loss_and_gradient_of_its_definition(num_sinks: int) -> None:
    lesson = build_lesson("attention_transfer", num_sinks)
    batch, context = random_batch(DOCUMENTS, 40), one_rank_context(DOCUMENTS)
    loss, num_valid = lesson(batch.tokens, batch.labels, context)
    (loss * 0.5).backward()
    got = gradients(lesson.student)
    lesson.student.zero_grad()

    # What goes into the teacher's mixers and what comes out, seen by hooks.
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for name, layer in lesson.teacher.named_layers():
        layer.mixer.register_forward_hook(
            lambda _, args, out, name=name: seen.update({name: (args[0], out)})
        )
    with torch.no_grad():
        lesson.teacher(batch.tokens, batch.labels, context)
    _, inside = lesson.student.begin(batch.tokens, context)
    counts, losses = batch.labels[0] >= 0, []
    for name in ("layers.0", "layers.2"):
        normed, target = seen[name]
        out = dict(lesson.student.named_layers())[name].mixer(normed, inside)
        error = (out - target)[0, num_sinks:].square().mean(-1)
        errors = error / (target[0, num_sinks:].square().mean(-1) + EPS)
        losses.append(errors[counts].sum())
    expected = (losses[0] + losses[1]) / 2
    (expected * 0.5).backward()

    assert num_valid == counts.sum()
    assert_close("loss", loss, expected, torch.float32)
    assert_close("sums", lesson.take(), torch.stack(losses), torch.float32)
    assert not lesson.take().any()
    wanted = gradients(lesson.student)
    assert got.keys() == wanted.keys()
    assert {name.split(".mixer.")[0] for name in got} == {"layers.0", "layers.2"}
    for name, gradient in wanted.items():
        assert_close(name, got[name], gradient, torch.float32)


def test_transfer_leaves_out_mixers_that_have_nothing_to_train() -> None:
    lesson = build_lesson("attention_transfer")
    lesson.student.get_submodule("layers.2.mixer").requires_grad_(False)
    found = AttentionTransfer(lesson.student, lesson.teacher, lambda _: nullcontext())
    assert (lesson.figures, found.figures) == (("layers.0", "layers.2"), ("layers.0",))


def test_distillation_has_the_loss_and_gradient_of_its_definition() -> None:
    lesson = build_lesson("distillation")
    batch, context = random_batch(DOCUMENTS, 40), one_rank_context(DOCUMENTS)
    loss, _ = lesson(batch.tokens, batch.labels, context)
    loss.backward()
    got = gradients(lesson.student)
    lesson.student.zero_grad()

    valid = batch.labels[0] >= 0
    logits, known = (
        model.head.logits(model.hidden(batch.tokens, context))[0, valid]
        for model in (lesson.student, lesson.teacher)
    )
    cross_entropy = torch.nn.functional.cross_entropy(
        logits, batch.labels[0, valid], reduction="sum"
    )
    p, log_q = (known / 2).softmax(-1).detach(), (logits / 2).log_softmax(-1)
    kl = (p * (p.log() - log_q)).sum()
    expected = 0.75 * cross_entropy + 0.25 * 4 * kl
    expected.backward()
    assert_close("loss", loss, expected, torch.float32)
    assert_close("sums", lesson.take(), torch.stack([cross_entropy, kl]), torch.float32)
    for name, gradient in gradients(lesson.student).items():
        assert_close(name, got[name], gradient, torch.float32)


@pytest.mark.parametrize("kind", ["attention_transfer", "distillation"])
def test_lesson_is_the_student_where_nothing_trains(kind: str) -> None:
    lesson = build_lesson(kind)
    batch, context = random_batch(DOCUMENTS, 40), one_rank_context(DOCUMENTS)
    lesson.student.eval()
    loss, _ = lesson(batch.tokens, batch.labels, context)
    expected, _ = lesson.student(batch.tokens, batch.labels, context)
    assert torch.equal(loss, expected)
    assert not any(p.requires_grad for p in lesson.teacher.parameters())
    assert {name.partition(".")[0] for name, _ in lesson.named_parameters()} == {"student"}


def run_lesson(world: World, setting: Setting, kind: str) -> dict[str, torch.Tensor]:
    """Return this rank's loss, figures and gradients."""
    lesson = build_lesson(kind)
    batch = random_batch(DOCUMENTS, 40)
    context = build_context(world, setting, batch.cu_seqlens)
    tokens, labels = (context.layout.shard(x) for x in (batch.tokens, batch.labels))
    loss, num_valid = lesson(tokens, labels, context)
    loss.backward()
    figures = {"loss": loss.detach(), "num_valid": num_valid, "sums": lesson.take()}
    return figures | gradients(lesson.student)


@pytest.mark.parametrize("kind", ["attention_transfer", "distillation"])
@pytest.mark.parametrize(
    "setting", [Setting(ulysses=2), Setting(ring=2, layout="zigzag", linear="scan")],
    ids=lambda setting: setting.id,
)  # fmt: skip
def test_ranks_of_a_sequence_sum_to_one_rank(setting: Setting, kind: str) -> None:
    expected = run_lesson(World(0, 1, 0), Setting(), kind)
    ranks = run_ranks(2, run_lesson, setting, kind)
    for name, value in expected.items():
        total = torch.stack([rank[name] for rank in ranks]).sum(0)
        assert_close(name, total, value, torch.float32)
