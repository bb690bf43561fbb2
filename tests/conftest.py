"""What every test gets: one thread, a seed, NaN in unwritten memory, no process group left over."""

import os
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers.poison import poison_uninitialized

SEED = 1234
if not torch.cuda.is_available():
    # Read when a kernel is imported: they run in Triton's interpreter here, and only if pinned.
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_configure() -> None:
    # Tests and the processes they start share few cores.
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA or ROCm device"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    with poison_uninitialized():
        yield


@pytest.fixture(autouse=True)
def _no_process_group_left() -> Iterator[None]:
    yield
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
        pytest.fail("the test left a process group behind; parallel.mesh.close_mesh() leaves it")
