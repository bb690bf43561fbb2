"""Loss of a checkpoint on the validation documents of its run."""

import math

import torch

from conf.schema import EvaluateConfig
from parallel.comm import Comm
from parallel.layout import build_layout
from parallel.mesh import Mesh
from parallel.sequence import SequenceContext
from trainer.data import TokenDataset, prepare, validation_batches
from trainer.restore import restore_model


@torch.no_grad()
def evaluate_run(config: EvaluateConfig, device: torch.device) -> dict[str, float]:
    """Return val_loss (nats per token), val_bits_per_byte and the tokens they are over."""
    run, model, _ = restore_model(config.run, device)
    data = TokenDataset(prepare(run.data), "val", run.data.seq_len, run.run.seed)
    count = config.max_sequences or data.num_sequences
    comm = Comm(Mesh(0, 1, 0, device))
    loss, tokens, num_bytes = 0.0, 0.0, 0.0
    for batch in validation_batches(data, count, run.data.micro_batch_size, 0, 1):
        context = SequenceContext(build_layout(batch.cu_seqlens), run.ops, comm)
        loss_sum, num_valid = model(batch.tokens.to(device), batch.labels.to(device), context)
        loss, tokens = loss + float(loss_sum), tokens + float(num_valid)
        num_bytes += batch.num_bytes
    return {
        "val_loss": loss / tokens,
        "val_bits_per_byte": loss / math.log(2) / num_bytes,
        "num_tokens": tokens,
    }
