"""The config of a training run, composed while another verb runs."""

from typing import Any

from hydra import compose
from omegaconf import OmegaConf


def compose_run() -> dict[str, Any]:
    """Return conf/train.yaml without overrides and without stages, as plain types."""
    tree = OmegaConf.to_container(compose("train"), resolve=True, throw_on_missing=True)
    assert isinstance(tree, dict), "a verb's config is a mapping"
    return {str(key): value for key, value in tree.items() if key != "stages"}
