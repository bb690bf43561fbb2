"""The batches of one rank: which it computes, who shares their sequences, and which it counts."""

import logging

from conf.schema import Config
from parallel.comm import Comm
from parallel.engine import MicroBatch
from parallel.hot_experts import HotExperts
from parallel.layout import SequenceLayout, build_layout
from parallel.sequence import SequenceContext
from trainer.data import Batch, micro_batches, open_data, validation_batches

logger = logging.getLogger(__name__)


class Feed:
    """Training and validation sequences as a rank of `comm` computes them."""

    def __init__(self, config: Config, comm: Comm) -> None:
        self.config, self.comm, self.mesh = config, comm, comm.mesh
        data = config.data
        self.train_data = open_data(data, "train", config.run.seed)
        self.val_data = open_data(data, "val", config.run.seed)
        self.grad_accum_steps = data.global_batch_size // (
            data.micro_batch_size * self.mesh.dp_size
        )

    def training(self, consumed: int) -> list[Batch]:
        """Return the micro batches of the step that begins at sample `consumed`."""
        data = self.config.data
        return micro_batches(
            self.train_data,
            consumed,
            global_batch_size=data.global_batch_size,
            micro_batch_size=data.micro_batch_size,
            dp_rank=self.mesh.dp_rank,
            dp_size=self.mesh.dp_size,
        )

    def validation(self) -> list[Batch]:
        """Return the micro batches of an evaluation."""
        return validation_batches(
            self.val_data,
            self.config.evaluation.max_sequences,
            self.config.data.micro_batch_size,
            self.mesh.dp_rank,
            self.mesh.dp_size,
        )

    def log_seen(self, consumed: int) -> None:
        """Say what of each source the run has been trained on."""
        logger.info("seen: %s", "; ".join(self.train_data.seen(consumed)))

    def shard(self, batch: Batch, hot_experts: HotExperts) -> MicroBatch:
        """Return this rank's tokens of a batch, and who has the others."""
        device, data, layout = self.mesh.device, self.config.data, self.layout(batch)
        context = SequenceContext(
            layout,
            self.config.ops,
            self.comm,
            self.config.parallel.linear,
            aux_loss_scale=self.mesh.stage.size / (data.global_batch_size * data.seq_len),
            hot_experts=hot_experts,
        )
        tokens, labels = layout.shard(batch.tokens), layout.shard(batch.labels)
        return MicroBatch(tokens.to(device), labels.to(device), context)

    def layout(self, batch: Batch) -> SequenceLayout:
        """Return who has which tokens of a batch."""
        parallel = self.config.parallel
        return build_layout(
            batch.cu_seqlens,
            kind=parallel.layout,
            sp_rank=self.mesh.sp_rank,
            sp_size=self.mesh.sp_size,
            ulysses=parallel.ulysses,
        )

    def counted(self, batches: list[Batch]) -> list[Batch]:
        """Return the batches that this rank counts, of those that all ranks of a sequence have."""
        return batches if self.mesh.sp_rank == self.mesh.pp.index == 0 else []
