"""A run directory in INT8 from another one, calibrated on its data, and a table of what is lost."""

import dataclasses
import logging
import math
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F

from conf.schema import Config, QuantizeConfig
from models.cache import LinearState
from models.causal_lm import CausalLM
from models.quantize import Statistics, apply_quantization, observe
from parallel.comm import Comm
from parallel.layout import build_layout
from parallel.mesh import Mesh
from parallel.sequence import SequenceContext
from trainer.data import Batch, open_data, validation_batches
from trainer.evaluation import Evaluation, Value
from trainer.evaluation.validation import ValidationSuite
from trainer.new_run import check_out, write_run
from trainer.restore import Restored, restore_model

logger = logging.getLogger(__name__)
CPU = torch.device("cpu")


def quantize_run(config: QuantizeConfig) -> tuple[Path, Evaluation]:
    """Write a run directory with a checkpoint of step 0; return the checkpoint and the table.

    Raises:
        ValueError: no sound checkpoint, one in INT8 already, or `out` is not empty.
        CheckpointWriteError: a file could not be written; nothing is left of it.
    """
    check_out(config.out)
    restored = restore_model(config.run, CPU, spike=config.spike)
    if restored.config.quantization is not None:
        raise ValueError(f"run={config.run} is in INT8 already; give the run that it was made from")
    table = _Table(config, restored)
    statistics = Statistics()
    _calibrate(restored, config, statistics)
    table.measure_float()
    weights = dataclasses.replace(config.quantization, kv_cache="none", state="none")
    apply_quantization(restored.model, weights, statistics)
    table.measure("INT8 weights")
    if config.quantization.kv_cache == "int8":
        apply_quantization(restored.model, config.quantization, statistics)
        table.measure("INT8 weights, keys, values")
    apply_quantization(restored.model, config.quantization, statistics)
    table.measure_state()
    old = restored.config
    run = dataclasses.replace(old.run, dir=config.out, resume=config.out)
    new = dataclasses.replace(old, run=run, adapters=None, quantization=config.quantization)
    tensors = dict(_tensors(restored.model))
    total_bytes = sum(tensor.nbytes for tensor in tensors.values())
    path = write_run(new, tensors.items(), config.out, total_bytes=total_bytes)
    return path, Evaluation("quantize", table.rows, table.notes)


@torch.no_grad()
def _calibrate(restored: Restored, config: QuantizeConfig, statistics: Statistics) -> None:
    """Show the float model samples of the run's training data, one by one."""
    run, model, _ = restored
    seq_len = min(config.seq_len, run.data.seq_len)
    data = open_data(dataclasses.replace(run.data, seq_len=seq_len), "train", run.run.seed)
    logger.info("calibrating on %d samples of %d tokens", config.samples, seq_len)
    with observe(model, statistics):
        for number in range(config.samples):
            window = data.sample(number)
            tokens = torch.from_numpy(window.tokens)[None]
            model(tokens, torch.from_numpy(window.labels)[None], _context(run, seq_len))


class _Table:
    """Rows of the same validation text, each beside the float model without spikes."""

    def __init__(self, config: QuantizeConfig, restored: Restored) -> None:
        self.config, self.restored = config, restored
        self.rows: list[dict[str, Value]] = []
        self.notes = [
            "ratio: perplexity over that of the float model without spikes, measured alike",
            "forward: whole sequences; decoding: token by token, the only way a state is rounded",
        ]
        off = dataclasses.replace(restored.config.spike, enabled=False)
        self._silent = restore_model(config.run, CPU, spike=off)

    def measure_float(self) -> None:
        """Add the rows of the model before quantization, without and with its spikes."""
        self.measure("float", self._silent)
        if self.restored.config.spike.enabled:
            self.measure("float, spikes")

    def measure(self, name: str, restored: Restored | None = None) -> None:
        """Add a row of whole sequences."""
        suite = ValidationSuite(max_sequences=self.config.max_sequences)
        row = suite.evaluate(restored or self.restored).rows[0]
        self._add(name, "forward", float(row["val_loss"] or 0), int(row["num_tokens"] or 0))

    def measure_state(self) -> None:
        """Add rows of decoding, if that rounds a state."""
        if self.config.quantization.state == "none":
            return
        run = self.restored.config
        batch = validation_batches(open_data(run.data, "val", run.run.seed), 1, 1, 0, 1)[0]
        name = "INT8 weights"
        if self.config.quantization.kv_cache == "int8":
            name += ", keys, values"
        sides = (
            ("float", self._silent.model, False),
            (name, self.restored.model, False),
            (f"{name}, state", self.restored.model, True),
        )
        for side, model, is_int8 in sides:
            loss, count = _decode(model, batch, self.config.decoded_tokens, run, is_int8=is_int8)
            self._add(side, "decoding", loss, count)

    def _add(self, name: str, measured: str, loss: float, num_tokens: int) -> None:
        first = next((row for row in self.rows if row["measured"] == measured), None)
        base = loss if first is None else float(first["nats_per_token"] or 0)
        self.rows.append(
            {
                "model": name,
                "measured": measured,
                "num_tokens": num_tokens,
                "nats_per_token": loss,
                "perplexity": math.exp(loss),
                "ratio": math.exp(loss - base),
            }
        )
        logger.info("%s: %.4f nats per token (%s)", name, loss, measured)


@torch.inference_mode()
def _decode(
    model: CausalLM, batch: Batch, num_tokens: int, run: Config, *, is_int8: bool
) -> tuple[float, int]:
    """Return the mean loss of the batch's first tokens, read as one document, and their number."""
    cache = model.new_cache()
    for entry in (entry for layer in cache for entry in layer.values()):
        if isinstance(entry, LinearState):
            entry.is_int8 = is_int8
    loss, count = 0.0, 0
    tokens, labels = batch.tokens[:, :num_tokens], batch.labels[0, :num_tokens]
    logits = model.prefill(tokens[:, :1], _context(run, 1), cache)
    for position in range(tokens.shape[1]):
        if position:
            logits = model.decode(tokens[:, position : position + 1], cache, position)
        if labels[position] >= 0:
            loss += float(F.cross_entropy(logits.float(), labels[position : position + 1]))
            count += 1
    return loss / count, count


def _context(run: Config, num_tokens: int) -> SequenceContext:
    """Return the context of one document on one rank."""
    layout = build_layout(torch.tensor([0, num_tokens], dtype=torch.int32))
    return SequenceContext(layout, run.ops, Comm(Mesh(0, 1, 0, CPU)))


def _tensors(model: CausalLM) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the parameters and buffers by their names in a checkpoint."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        yield f"model/{name}", tensor.detach()
