"""Which part of the model each rank holds."""

from conf.schema import Config
from parallel.mesh import Mesh
from parallel.pipeline import ModelPart, cut_layers
from trainer.flops import FlopCounter


def choose_part(flops: FlopCounter, config: Config, mesh: Mesh) -> ModelPart:
    """Return the part of this rank: a stage of even FLOPs, and an even part of the experts."""
    layers, head = flops.layer_costs(config.data.seq_len)
    stages = cut_layers(layers, mesh.pp.size, head=head)
    return ModelPart(
        stages[mesh.pp.index],
        has_embedding=mesh.pp.index == 0,
        has_head=mesh.pp.index == mesh.pp.size - 1,
        ep_rank=mesh.ep.index,
        ep_size=mesh.ep.size,
    )
