"""Device families, one file each with an `ACCELERATOR` object (see trainer/accelerator.py)."""

import importlib

from trainer.accelerator import Accelerator


def load_accelerator(name: str) -> Accelerator:
    """Return the device family of conf/accelerator/<name>.yaml.

    Raises:
        ValueError: there is no such family.
    """
    try:
        module = importlib.import_module(f"cluster.accelerators.{name}")
    except ModuleNotFoundError as error:
        raise ValueError(
            f"accelerator.name={name}: no cluster/accelerators/{name}.py; use cpu or cuda"
        ) from error
    accelerator: Accelerator = module.ACCELERATOR
    return accelerator
