"""A tensor that several shards hold in parts is read whole or by rows, and a lost part is told."""

from pathlib import Path

import pytest
import torch
from helpers.models import build_model, compose_config
from safetensors.torch import save_file

from models.causal_lm import CausalLM
from parallel.layout import Segment
from trainer.checkpoint import CheckpointStore
from trainer.checkpoint_tensors import CheckpointDamaged, CheckpointTensors, rows_name
from trainer.model_state import load_weights

WHOLE = torch.arange(24.0).view(8, 3)


def write(folder: Path, *shards: dict[str, torch.Tensor]) -> list[Path]:
    paths = [folder / f"shard_{i}.safetensors" for i in range(len(shards))]
    for path, tensors in zip(paths, shards, strict=True):
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return paths


def rows(*bounds: int) -> dict[str, torch.Tensor]:
    """Return parts of the tensor `x`: of rows from the first bound to the second, and so on."""
    pairs = zip(bounds[::2], bounds[1::2], strict=True)
    return {rows_name("x", Segment(a, b)): WHOLE[a:b] for a, b in pairs}


@pytest.mark.parametrize(
    "shards",
    [(rows(0, 8),), (rows(4, 8), rows(0, 4)), (rows(6, 8, 0, 1), rows(3, 6), rows(1, 3)),
     ({"x": WHOLE},)],
    ids=["one", "two-reversed", "uneven", "no-part"],
)  # fmt: skip
def test_parts_are_read_whole_and_by_rows(
    tmp_path: Path, shards: tuple[dict[str, torch.Tensor], ...]
) -> None:
    tensors = CheckpointTensors(write(tmp_path, *shards, {"y": torch.ones(2)}))
    assert sorted(tensors) == ["x", "y"]
    assert tensors.shapes == {"x": WHOLE.shape, "y": torch.Size([2])}
    assert tensors.get("x").equal(WHOLE)
    for start in range(8):
        for stop in range(start + 1, 9):
            assert tensors.get("x", Segment(start, stop)).equal(WHOLE[start:stop])
    with pytest.raises(ValueError, match="'x' has 8 rows, not 7 to 9"):
        tensors.get("x", Segment(7, 9))


@pytest.mark.parametrize(
    ("shards", "told"),
    [
        ((rows(0, 2), rows(4, 8)), r"shard_1.*'x\[4:8\]' does not go on where 'x' stops, at row 2"),
        ((rows(2, 8),), r"shard_0.*'x\[2:8\]' does not go on where 'x' stops, at row 0"),
        ((rows(0, 4), rows(3, 8)), r"shard_1.*'x\[3:8\]' is also in .*shard_0"),
        ((rows(0, 8), {"x": WHOLE}), r"shard_1.*'x' is also in .*shard_0"),
        (({"x[0:8]": WHOLE[:5]},), r"shard_0.*'x\[0:8\]' has shape \[5, 3\], not 8 rows"),
        (({"x[0:1]": torch.tensor(1.0)},), r"'x\[0:1\]' has shape \[\], not 1 rows"),
    ],
    ids=["middle", "first", "twice", "whole-and-part", "short", "scalar"],
)
def test_lost_rows_are_told(
    tmp_path: Path, shards: tuple[dict[str, torch.Tensor], ...], told: str
) -> None:
    with pytest.raises(CheckpointDamaged, match=told):
        CheckpointTensors(write(tmp_path, *shards))


EXPERTS = "layers.1.ffn.experts.up_proj"


@pytest.fixture
def model() -> CausalLM:
    return build_model(compose_config("model=tiny_moe", "model.hidden_size=32").model)


@pytest.mark.parametrize("kept", [1, 4])
def test_experts_lost_at_the_end_are_told(tmp_path: Path, model: CausalLM, kept: int) -> None:
    """Also where one is left, which would stand for all if it were copied as it is."""
    shard = {f"model/{name}": t.clone() for name, t in model.state_dict().items()}
    shard.pop("model/head.weight")
    whole = shard.pop(f"model/{EXPERTS}")
    shard[rows_name(f"model/{EXPERTS}", Segment(0, kept))] = whole[:kept]
    store = CheckpointStore(tmp_path, keep=1)
    store.begin(1)
    store.write_shard(1, 0, shard)
    path = store.commit(1, {})
    with pytest.raises(CheckpointDamaged, match=rf"'{EXPERTS}' has shape \[{kept}, .*\[8, "):
        load_weights(model, path)
