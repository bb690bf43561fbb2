"""Suites composed as from the command line, and models to hand them without a run directory."""

from pathlib import Path
from typing import Any

from helpers.models import TINY, build_model, compose_config, compose_tree

from conf.schema import EvaluateConfig, build
from trainer.evaluation import Evaluation
from trainer.restore import Restored


def evaluate(restored: Restored, suite: str, **settings: Any) -> Evaluation:
    """Run a suite with settings of its own, given as on the command line."""
    overrides = [f"++suites.{suite}.{key}={value}" for key, value in settings.items()]
    tree = compose_tree("run=none", f"suite={suite}", *overrides, config_name="evaluate")
    return build(EvaluateConfig, tree).suites[suite].evaluate(restored)


def restored_model(*overrides: str, seed: int = 0) -> Restored:
    """Return a tiny model of bytes as a run would leave it, with Hydra overrides of its config."""
    config = compose_config(*TINY, "model.vocab_size=264", "data.seq_len=32", *overrides)
    model = build_model(config.model, spiking=config.spike.enabled, seed=seed).eval()
    return Restored(config, model, Path("none"))
