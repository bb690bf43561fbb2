"""A run with sinks: split over ranks it equals one rank, its checkpoint comes back and decodes."""

from pathlib import Path

import pytest
import torch
from helpers.runs import column, run, run_ranks, tiny
from safetensors.torch import load_file

from conf.schema import GenerateConfig
from parallel.comm import Comm
from parallel.layout import build_layout
from parallel.mesh import Mesh
from parallel.sequence import SequenceContext
from trainer.evaluation.validation import ValidationSuite
from trainer.export import export_safetensors
from trainer.generate import generate
from trainer.restore import restore_model

CPU = torch.device("cpu")
SINKS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data of all runs here, and the run of one rank in `one`."""
    path = tmp_path_factory.mktemp("sinks")
    run(train(path, "one"), path)
    return path


def train(folder: Path, name: str, *overrides: str) -> list[str]:
    # So that what a token sees changes what follows it, untrained as the model nearly is.
    wide = ("model.init_std=0.1", "model.tie_embeddings=false")
    return tiny(folder, *wide, f"model.num_sinks={SINKS}", f"run.dir={name}", *overrides)


def test_partitioned_and_recomputed_sinks_equal_those_of_one_rank(folder: Path) -> None:
    split = ("parallel.zero_stage=3", "parallel.ring=2", "parallel.recompute=full")
    run_ranks(train(folder, "two", *split), folder)
    for key in ("loss", "grad_norm"):
        assert column(folder / "two", key) == pytest.approx(column(folder / "one", key), rel=1e-5)
    found = (
        ValidationSuite(max_sequences=5).evaluate(restore_model(str(folder / "two"), CPU)).rows[0]
    )
    assert found["val_loss"] == pytest.approx(column(folder / "one", "val_loss")[-1], rel=1e-5)


def test_spikes_of_the_sinks_are_not_counted_per_rank(folder: Path) -> None:
    overrides = ("spike.enabled=true", "spike.rate_weight=0.5", "run.steps=2")
    run(train(folder, "spikes-one", *overrides), folder)
    run_ranks(train(folder, "spikes-two", *overrides, "parallel.ring=2"), folder)
    tolerances = {"loss": 1e-5, "grad_norm": 1e-5, "spike_sparsity": 1e-4, "mean_spikes": 1e-4}
    for key, rel in tolerances.items():
        one, two = (column(folder / f"spikes-{name}", key)[0] for name in ("one", "two"))
        assert two == pytest.approx(one, rel=rel), key


def test_the_checkpoint_holds_the_sinks_as_trained(folder: Path, tmp_path: Path) -> None:
    config, model, checkpoint = restore_model(str(folder / "one"), CPU)
    assert model.sinks is not None
    trained = model.sinks.weight.detach().clone()
    out = export_safetensors(checkpoint, tmp_path, torch.float32)
    exported = load_file(out / "model.safetensors")
    assert torch.equal(exported["sinks.weight"], trained)
    model.reset_parameters(config.run.seed)
    moved = (trained - model.sinks.weight.detach()).abs().amax(dim=1)
    assert moved.shape == (SINKS,)
    assert float(moved.min()) > 1e-5


def test_a_trained_model_decodes_what_it_computes_at_once(folder: Path) -> None:
    model = restore_model(str(folder / "one"), CPU).model
    assert model.sinks is not None
    config = GenerateConfig(
        run="", prompt="", max_new_tokens=40, temperature=1.0, top_k=0, seed=0,
        stop_at_end=False, time_every=0,
    )  # fmt: skip
    prompt = list(b"axon ")

    def context(length: int) -> SequenceContext:
        layout = build_layout(torch.tensor([0, length], dtype=torch.int32))
        return SequenceContext(layout, model.ops, Comm(Mesh(0, 1, 0, CPU)))

    tokens = list(generate(model, prompt, config, context(5), 256))
    assert len(set(tokens)) > 10
    generator = torch.Generator().manual_seed(0)
    for n in range(40):
        seen = torch.tensor([prompt + tokens[:n]])
        logits = model.prefill(seen, context(5 + n), model.new_cache())
        drawn = torch.multinomial(logits[0, :256].softmax(-1), 1, generator=generator)
        assert int(drawn) == tokens[n]
