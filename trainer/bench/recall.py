"""`suite=recall`: train a small model on multi-query associative recall from scratch (MQAR-S).

64 tokens: 4 keys with their values, then each key once more at a random later place, before its
value; fillers elsewhere. It tells mixers that can look things up from those that cannot
(arXiv:2312.04927). Training ends at the first check with 99 % of the values right.
"""

import logging
import math
import time
from collections.abc import Iterator

import torch

from conf.schema import BenchConfig, OpsConfig, SpikeConfig
from models.causal_lm import CausalLM, layer_list
from parallel.layout import build_layout
from parallel.sequence import SequenceContext
from trainer.accelerator import Accelerator
from trainer.bench.rows import Row

SEQ_LEN, NUM_PAIRS, VOCAB_SIZE, BATCH_SIZE = 64, 4, 64, 64
"""Token 0 fills; keys are the rest of the lower half of the vocabulary, values the upper half."""
LR, STEPS, CHECK_EVERY, GOOD = 3e-3, 2000, 250, 0.99

logger = logging.getLogger(__name__)


def bench_recall(config: BenchConfig, accelerator: Accelerator, peak: float) -> Iterator[Row]:
    """Yield accuracy, steps and seconds of `config.model`; model=recall has the right sizes.

    Raises:
        ValueError: the vocabulary is too small for the task.
    """
    if config.model.vocab_size < VOCAB_SIZE:
        raise ValueError(
            f"model.vocab_size={config.model.vocab_size}: the task has {VOCAB_SIZE} tokens; use "
            f"model.vocab_size={VOCAB_SIZE}, or model=recall"
        )
    spike = SpikeConfig(enabled=False, k=3.0)
    model = CausalLM(config.model, spike, OpsConfig(), dtype=getattr(torch, config.dtype))
    model.reset_parameters(0)
    model.to(accelerator.device(0))
    start = time.perf_counter()
    step, accuracy = 0, 0.0
    for check in train_recall(model, STEPS, CHECK_EVERY):
        step, accuracy = check
        logger.info("suite=recall: step %d, accuracy %.4f", step, accuracy)
        if accuracy >= GOOD:
            break
    seconds = time.perf_counter() - start
    layers = ", ".join("+".join(layer.mixers) for layer in layer_list(config.model))
    case = f"recall, {layers}"
    yield Row(case, "accuracy", accuracy, "of the values")
    yield Row(case, "steps", step, "steps")
    yield Row(case, "seconds", seconds, "s")


def train_recall(model: CausalLM, steps: int, check_every: int) -> Iterator[tuple[int, float]]:
    """Train a model and yield (steps so far, accuracy on new sequences) at every check."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    generator = torch.Generator().manual_seed(0)
    context = SequenceContext(
        build_layout(torch.arange(BATCH_SIZE + 1, dtype=torch.int32) * SEQ_LEN), OpsConfig()
    )
    device = model.embed.weight.device
    for step in range(1, steps + 1):
        tokens, labels = (x.to(device) for x in recall_batch(BATCH_SIZE, generator))
        loss_sum, num_valid = model(tokens, labels, context)
        optimizer.param_groups[0]["lr"] = LR * (1 + math.cos(math.pi * step / steps)) / 2
        (loss_sum / num_valid).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % check_every == 0 or step == steps:
            yield step, _accuracy(model, context, torch.Generator().manual_seed(1))


def recall_batch(
    num_sequences: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens and labels, int64 [1, num_sequences * 64]; only values that follow a question
    have labels, the others -100.
    """
    tokens = torch.zeros(num_sequences, SEQ_LEN, dtype=torch.int64)
    labels = torch.full_like(tokens, -100)
    half, first = VOCAB_SIZE // 2, 2 * NUM_PAIRS
    for row, label in zip(tokens, labels, strict=True):
        keys = 1 + torch.randperm(half - 1, generator=generator)[:NUM_PAIRS]
        values = half + torch.randint(half, (NUM_PAIRS,), generator=generator)
        row[:first] = torch.stack([keys, values], 1).flatten()
        slots = torch.randperm((SEQ_LEN - first) // 2, generator=generator)[:NUM_PAIRS]
        places = first + 2 * slots
        row[places], row[places + 1], label[places] = keys, values, values
    return tokens.view(1, -1), labels.view(1, -1)


@torch.no_grad()
def _accuracy(model: CausalLM, context: SequenceContext, generator: torch.Generator) -> float:
    tokens, labels = recall_batch(BATCH_SIZE, generator)
    hidden = model.hidden(tokens.to(model.embed.weight.device), context)[0]
    asked = labels[0] >= 0
    likeliest = model.head.logits(hidden[asked.to(hidden.device)]).argmax(1).cpu()
    return float((likeliest == labels[0][asked]).double().mean())
