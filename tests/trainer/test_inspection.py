"""One token's spikes before one projection: exact products, and what can be asked for."""

from pathlib import Path
from unittest import mock

import pytest
import torch
from helpers.evaluation import restored_model

from conf.schema import InspectConfig, QuantizationConfig
from models.layers import Projection
from models.quantize import Statistics, apply_quantization
from models.spiking import Spikes
from ops.spike import decode
from ops.spike.coding import CODINGS
from trainer import inspection
from trainer.inspection import Inspection, inspect_spikes
from trainer.restore import Restored


def ask(restored: Restored, **fields: object) -> Inspection:
    known = {"prompt": "hello spikes", "token": -2, "layer": 1, "projection": "down_proj"}
    config = InspectConfig(run=str(Path("none")), channels=12, outputs=5, **(known | fields))  # type: ignore[arg-type]
    with mock.patch.object(inspection, "restore_model", return_value=restored):
        return inspect_spikes(config, torch.device("cpu"))


@pytest.mark.parametrize(
    "overrides", [(), ("model.num_sinks=3",), ("dtype=bfloat16",)], ids=["plain", "sinks", "bf16"]
)
def test_products_from_trains_are_those_from_counts(overrides: tuple[str, ...]) -> None:
    restored = restored_model("spike.enabled=true", *overrides)
    found = ask(restored)
    assert found.is_exact
    assert set(found.from_trains) == set(CODINGS)
    weight = restored.model.get_submodule("layers.1.ffn.down_proj").weight.detach()
    scale = weight.abs().amax(1) / 127
    integers = (weight / scale[:, None]).round().long()
    assert torch.equal(found.from_counts.long(), integers @ found.count)
    torch.testing.assert_close(found.output, found.threshold * scale * found.from_counts)
    torch.testing.assert_close(found.dense, weight @ found.x)
    for coding, parts in found.trains.items():
        counts = [decode(part, coding) for part in parts]
        assert torch.equal(counts[0] - sum(counts[1:]), found.count), coding
    assert float(found.x.abs().mean()) / found.threshold == pytest.approx(3.0)
    text = found.text(12, 5)
    assert "'e'" in found.title
    assert "equal those from counts bit for bit" in text
    assert "binary" in text


@pytest.mark.parametrize("group_size", [None, 64])
def test_int8_weights_are_taken_as_they_are(group_size: int | None) -> None:
    restored = restored_model("spike.enabled=true", "model.ffns.dense.intermediate_size=100")
    settings = QuantizationConfig(group_size=group_size, kv_cache="none")
    apply_quantization(restored.model, settings, Statistics())
    found = ask(restored)
    projection = restored.model.get_submodule("layers.1.ffn.down_proj")
    assert found.is_exact
    assert torch.equal(found.from_counts.long(), projection.weight.long() @ found.count)
    spikes = Spikes(found.count.float()[None], torch.tensor([[found.threshold]]))
    torch.testing.assert_close(found.output, projection(spikes)[0])
    assert float((found.output - found.dense).norm() / found.dense.norm()) < 0.2


def test_a_wrong_train_is_told() -> None:
    found = ask(restored_model("spike.enabled=true"))
    found.from_trains["ternary"][2] += 1
    assert not found.is_exact
    assert "DIFFER" in found.text(2, 2)


def test_the_token_is_the_one_that_was_asked_for() -> None:
    restored = restored_model("spike.enabled=true")
    every = [ask(restored, token=i).x for i in range(12)]
    assert torch.equal(every[10], ask(restored, token=-2).x)
    assert not torch.equal(every[10], every[9])
    first = ask(restored, prompt="hello spikez", token=10).x  # what comes later changes nothing
    torch.testing.assert_close(first, every[10])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"token": 12}, "token=12 is none of the 12 tokens of the prompt; use -1 to 11"),
        ({"layer": 9}, "layer=9 is none of the model's; use 0 to 2"),
        ({"projection": "proj"}, "projection=proj is none of .*down_proj"),
        ({"layer": 2, "projection": "q_proj"}, "q_proj means several .*linear.q_proj, .*window.q"),
    ],
)
def test_what_is_not_there_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ask(restored_model("spike.enabled=true"), **fields)


def test_an_input_without_spikes_is_refused() -> None:
    restored = restored_model("spike.enabled=false")
    assert isinstance(restored.model.get_submodule("layers.1.ffn.down_proj"), Projection)
    with pytest.raises(ValueError, match="is not spiked in this run; use spike="):
        ask(restored)
