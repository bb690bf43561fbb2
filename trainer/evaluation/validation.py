"""Suite `validation`: loss of a checkpoint on the validation documents of its run."""

import math

import torch
from pydantic.dataclasses import dataclass

from conf.schema import STRICT, PositiveInt
from parallel.comm import Comm
from parallel.layout import build_layout
from parallel.mesh import Mesh
from parallel.sequence import SequenceContext
from trainer.data import open_data, validation_batches
from trainer.evaluation import Evaluation
from trainer.restore import Restored


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ValidationSuite:
    max_sequences: PositiveInt | None
    """Validation sequences; null: all."""

    @torch.no_grad()
    def evaluate(self, restored: Restored) -> Evaluation:
        """Return val_loss (nats per token), val_bits_per_byte and the tokens they are over."""
        run, model, _ = restored
        device = next(model.parameters()).device
        data = open_data(run.data, "val", run.run.seed)
        count = self.max_sequences or data.num_sequences
        comm = Comm(Mesh(0, 1, 0, device))
        loss, tokens, num_bytes = 0.0, 0.0, 0.0
        for batch in validation_batches(data, count, run.data.micro_batch_size, 0, 1):
            context = SequenceContext(build_layout(batch.cu_seqlens), run.ops, comm)
            loss_sum, num_valid = model(batch.tokens.to(device), batch.labels.to(device), context)
            loss, tokens = loss + float(loss_sum), tokens + float(num_valid)
            num_bytes += batch.num_bytes
        row = {
            "val_loss": loss / tokens,
            "val_bits_per_byte": loss / math.log(2) / num_bytes,
            "num_tokens": int(tokens),
        }
        return Evaluation("validation", [row])
