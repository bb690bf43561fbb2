"""Which part of the model each rank holds."""

import logging

from conf.schema import Config
from parallel.mesh import Mesh
from parallel.pipeline import ModelPart, cut_layers
from trainer.flops import FlopCounter

logger = logging.getLogger(__name__)


def choose_part(flops: FlopCounter, config: Config, mesh: Mesh) -> ModelPart:
    """Return the part of this rank: a stage of even FLOPs, and an even part of the experts."""
    data, num_stages = config.data, mesh.pp.size
    layers, head = flops.layer_costs(data.seq_len)
    stages = cut_layers(layers, num_stages, head=head)
    if num_stages > 1:
        count = data.global_batch_size // (data.micro_batch_size * mesh.dp_size)
        logger.info(
            "pipeline: stages of %s layers, %d micro batches%s; a stage waits %.0f%% of a step",
            "+".join(str(len(stage)) for stage in stages),
            count,
            ", fewer than stages" if count < num_stages else "",
            100 * (num_stages - 1) / (count + num_stages - 1),
        )
    return ModelPart(
        stages[mesh.pp.index],
        has_embedding=mesh.pp.index == 0,
        has_head=mesh.pp.index == num_stages - 1,
        ep_rank=mesh.ep.index,
        ep_size=mesh.ep.size,
    )
