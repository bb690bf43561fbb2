"""Suite spikes: its figures against trains and counts made by hand, and the search for a k."""

import dataclasses
import itertools
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from helpers.evaluation import evaluate, restored_model
from helpers.models import compose_tree, one_rank_context

from conf.schema import EvaluateConfig, QuantizationConfig, SpikeConfig, build
from models.quantize import apply_quantization
from models.spiking import SpikeEncoder, Spikes, set_spiking, spike_encoders
from ops.spike import encode, spike_count, spike_statistics
from ops.spike.coding import CODINGS
from trainer.energy import mean_energy
from trainer.evaluation import Value
from trainer.evaluation.spike_search import find_setting
from trainer.evaluation.spikes import SpikesSuite
from trainer.restore import Restored
from trainer.spike_observer import MOST_COUNT, InputCounts, SpikeObserver

TEXT = "axons carry spikes over long distances, and counts of them are small. " * 3
MOE = (
    "model.layers=[{mixers:[linear],ffn:moe},{mixers:[window],ffn:dense}]",
    "+model.ffns.moe.intermediate_size=24",
    "+model.ffns.moe.moe={num_experts:4,top_k:2,num_shared_experts:1,score:softmax,"
    "normalize:true,balance_loss:0.0,z_loss:0.0,bias_rate:0.0,capacity:null,spiking_router:false}",
)


@pytest.fixture(scope="module")
def restored() -> Restored:
    return restored_model("spike.enabled=true", "model.init_std=0.3")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.mark.parametrize("coding", CODINGS)
def test_spikes_of_a_coding_are_those_of_its_trains(coding: str) -> None:
    count, _ = spike_count(torch.distributions.Laplace(0.3, 1.0).sample((50, 64)), 4.0)
    has_sign = coding not in ("binary", "bitwise")
    observed = InputCounts()
    for sign, histogram in ((1, observed.positive), (-1, observed.negative)):
        sizes = (sign * count[sign * count > (0 if sign < 0 else -1)]).long()
        histogram += sizes.bincount(minlength=len(histogram))
    for most in (observed.most(), 7):
        kept = count[count.abs() <= most]
        train = encode(kept if has_sign else kept.abs(), coding)
        steps, spikes = observed.spikes(coding, most)
        assert steps == len(train)
        assert spikes == pytest.approx(float(train.abs().sum()) / kept.numel())


@pytest.mark.parametrize("is_integer", [False, True], ids=["float", "int8"])
def test_inputs_are_charged_with_the_weights_that_multiply_them(is_integer: bool) -> None:
    model = restored_model("spike.enabled=true", *MOE).model
    q_proj = model.get_submodule("layers.1.mixer.branches.window.q_proj").weight
    k_proj = model.get_submodule("layers.1.mixer.branches.window.k_proj").weight
    if is_integer:
        apply_quantization(model, QuantizationConfig(kv_cache="none"))
    tokens = torch.randint(0, 256, (1, 20))
    with SpikeObserver(model) as seen, torch.no_grad():
        model.hidden(tokens, one_rank_context([20]))
    routed = 2 * 20 * 24 * 32  # top_k rows of every token
    expected = {
        "layers.0.ffn.experts.encode_in": 2 * routed,
        "layers.0.ffn.experts.encode_out": routed,
        "layers.0.ffn.shared.encode_in": 20 * 2 * 24 * 32,
    }
    assert {name: seen.inputs[name].macs for name in expected} == expected
    assert seen.dense_macs == seen.integer_macs == 0
    found = seen.inputs["layers.1.mixer.branches.window.encode_in"].macs
    assert found == 20 * (q_proj.numel() + 2 * k_proj.numel())
    set_spiking(model, SpikeConfig(enabled=False, k=3.0))
    with SpikeObserver(model) as off, torch.no_grad():
        model.hidden(tokens, one_rank_context([20]))
    macs = (0, seen.macs) if is_integer else (seen.macs, 0)
    assert (off.dense_macs, off.integer_macs) == macs
    assert mean_energy(off) == pytest.approx(0.23 if is_integer else 1.5)


def test_rows_are_those_of_counts_made_by_hand(restored: Restored, text: Path) -> None:
    result = evaluate(restored, "spikes", path=text, ks="[2.0,3.0]", max_tokens=100)
    off, _, row = result.rows[:3]
    counts: list[torch.Tensor] = []

    def keep(encoder: SpikeEncoder, _: object, spikes: Spikes) -> None:
        assert encoder.k == 3.0  # the setting of the run is back
        counts.append(spikes.count.flatten())

    handles = [e.register_forward_hook(keep) for e in spike_encoders(restored.model).values()]
    again = evaluate(restored, "text", path=text, max_tokens=100).rows[0]
    for handle in handles:
        handle.remove()
    assert row["perplexity"] == pytest.approx(again["perplexity"], rel=1e-5)
    sizes = torch.cat(counts).abs().long()
    bits = torch.tensor([int(n).bit_count() for n in sizes], dtype=torch.float64)
    few = sizes <= 7
    assert row["mean_spikes"] == pytest.approx(float(bits.mean()))
    assert row["sparsity_all"] == pytest.approx(1 - float(bits.mean()) / 3)
    assert row["sparsity_within_7"] == pytest.approx(1 - float(bits[few].mean()) / 3)
    assert row["share_silent"] == pytest.approx(float((sizes == 0).double().mean()))
    assert row["share_above_16"] == pytest.approx(float((sizes > 16).double().mean()))
    assert (off["ratio"], off["pj_per_mac"], off["mean_spikes"]) == (1.0, 1.5, None)
    assert row["ratio"] == pytest.approx(row["perplexity"] / off["perplexity"])
    inputs = result.tables["by input, k = 3"]
    macs = sum(line["macs"] for line in inputs)
    energy = sum(line["macs"] * line["mean_spikes"] * 0.03 for line in inputs) / macs
    assert row["pj_per_mac"] == pytest.approx(energy)
    report = [line for line in result.rows if line["source"] == "report"]
    assert report[2]["mean_spikes"] == 1.13


def test_tables_and_figures_are_saved(restored: Restored, text: Path, tmp_path: Path) -> None:
    result = evaluate(restored, "spikes", path=text, ks="[3.0]", max_tokens=60)
    printed = result.table()
    assert "[bits set in |count|]" in printed
    assert "1.5 pJ" in printed
    result.save(tmp_path / "out.json")
    saved = json.loads((tmp_path / "out.json").read_text())
    assert list(saved["tables"]) == [
        f"{k}, k = 3" for k in ("by coding", "by kind of input", "by input")
    ]
    for name in ("trade_off", "counts", "layers", "raster"):
        svg = (tmp_path / f"out.{name}.svg").read_text()
        assert svg.startswith('<svg xmlns="http://www.w3.org/2000/svg"')
        assert "--ink:#1c2430" in svg


KS = (1.0, 2.0, 6.0)
SENSITIVITIES = {"layers.0.a": 0.3, "layers.1.a": 0.6, "layers.0.b": 5.0}


@dataclass(frozen=True)
class Supposed:
    """A measurement of a model whose loss is the sum that the search supposes."""

    inputs: dict[str, InputCounts]

    @property
    def loss(self) -> float:
        return 2.0 + sum(SENSITIVITIES[n] * c.relative_error**2 for n, c in self.inputs.items())

    def row(self, k: str, dense_loss: float) -> dict[str, Value]:
        histogram = sum(c.histogram for c in self.inputs.values())
        assert isinstance(histogram, torch.Tensor)
        sparsity = spike_statistics(histogram)["sparsity_within_7"]
        assert isinstance(sparsity, float)
        return {"ratio": math.exp(self.loss - dense_loss), "sparsity": sparsity}


def suppose(setting: SpikeConfig) -> Supposed:
    inputs = {}
    for i, name in enumerate(SENSITIVITIES):
        k = next(
            (k for n, k in reversed((setting.k_by_input or {}).items()) if n in ("*", name)),
            setting.k,
        )
        if setting.enabled and k:
            x = torch.randn(100, 64, generator=torch.Generator().manual_seed(i))
            count, threshold = spike_count(x, k)
            sizes = count.long().flatten().abs()
            inputs[name] = InputCounts(
                positive=sizes.bincount(minlength=MOST_COUNT + 1).double(),
                squared_error=float((count * threshold - x).square().sum()),
                squared=float(x.square().sum()),
            )
    return Supposed(inputs)


def test_the_sparsest_setting_within_the_budget_is_found() -> None:
    ratio = 1.05
    found = find_setting(
        suppose, suppose, by="input", ladder=KS, max_ratio=ratio, target=0.69
    ).rows[0]
    rows = [
        suppose(
            SpikeConfig(enabled=True, k=3.0, k_by_input=dict(zip(SENSITIVITIES, ks, strict=True)))
        ).row("", 2.0)
        for ks in itertools.product(KS, repeat=3)
    ]
    allowed = [row["sparsity"] for row in rows if row["ratio"] <= ratio]
    assert 1 < len(allowed) < len(rows) - 1
    assert found["ratio"] <= ratio
    assert found["sparsity"] == max(allowed)


def test_a_found_setting_is_printed_as_an_override(restored: Restored, text: Path) -> None:
    result = evaluate(
        restored, "spikes", path=text, ks="[3.0]", ladder="[1.5,3.0]", seq_len=64,
        target_sparsity=0.69, max_ratio=1.05,
    )  # fmt: skip
    assert result.tables["found"][0]["ratio"] <= 1.05
    note = next(note for note in result.notes if note.startswith("Found: spike="))
    override = note.removeprefix("Found: ")
    tree = compose_tree("run=none", override, config_name="evaluate")
    spike = build(EvaluateConfig, tree).spike
    assert isinstance(spike, SpikeConfig)
    assert set(re.findall(r"(layers[^:]+):", override)) == set(spike.k_by_input or {})
    again = evaluate(
        restored._replace(config=dataclasses.replace(restored.config, spike=spike)),
        "spikes",
        path=text,
        ks="[9.0]",
        seq_len=64,
    )
    config = next(row for row in again.rows if row["k"] == "config")
    halves = [row["mean_spikes"] for row in result.tables["found"]]
    assert min(halves) <= config["mean_spikes"] <= max(halves)


def test_what_cannot_be_measured_is_refused(restored: Restored, text: Path) -> None:
    with pytest.raises(ValueError, match="target_sparsity needs two windows"):
        evaluate(restored, "spikes", path=text, max_tokens=20, target_sparsity=0.69)
    text.write_text("a")
    with pytest.raises(ValueError, match=r"suites\.spikes has no text of two tokens"):
        evaluate(restored, "spikes", path=text)
    with pytest.raises(ValueError, match="must rise"):
        SpikesSuite(
            path=None, max_tokens=1, seq_len=None, ks=[3.0], target_sparsity=None, max_ratio=1.1,
            by="kind", ladder=[2.0, 1.0],
        )  # fmt: skip
