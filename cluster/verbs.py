"""What each verb does with its composed config. Returns the exit code; ValueError is a bad config.

Heavy packages are imported by the verb that needs them, so that a wrong key is refused at once.
"""

import dataclasses
import logging
import sys
from pathlib import Path
from typing import Any

from conf.schema import (
    BenchConfig,
    Config,
    ConvertConfig,
    EvaluateConfig,
    ExportConfig,
    GenerateConfig,
    ReportConfig,
    build,
)

logger = logging.getLogger(__name__)


def train(tree: dict[str, Any]) -> int:
    """Check the config, then train."""
    config = build(Config, tree)
    from cluster.accelerators import load_accelerator
    from cluster.launch import FAILED, last_checkpoint, launch
    from parallel.flight_recorder import CommunicationError
    from parallel.mesh import read_world
    from trainer.checks import check_config
    from trainer.data import prepare
    from trainer.run_dir import open_run_dir

    accelerator = load_accelerator(config.accelerator.name)
    if config.dtype == "auto":
        fast = accelerator.prefers_bfloat16()
        config = dataclasses.replace(config, dtype="bfloat16" if fast else "float32")
    env = config.launcher.name == "env"
    check_config(
        config, accelerator, read_world().world_size if env else config.launcher.num_workers
    )
    if not env or read_world().rank == 0:
        config, run_dir, _lock = open_run_dir(config)
        logger.info("run directory: %s", run_dir)
    prepare(config.data)
    try:
        return launch(config, accelerator)
    except CommunicationError:
        return FAILED  # told by the rank
    except Exception:
        logger.exception("the run failed; last complete checkpoint: %s", last_checkpoint(config))
        return FAILED


def evaluate(tree: dict[str, Any]) -> int:
    """Print what a suite measures of a run's checkpoint."""
    config = build(EvaluateConfig, tree)
    import torch

    from trainer.restore import restore_model

    restored = restore_model(config.run, torch.device("cpu"), spike=config.spike)
    result = config.suites[config.suite].evaluate(restored)
    print(result.table())
    if config.out is not None:
        result.save(Path(config.out))
    return 0


def generate(tree: dict[str, Any]) -> int:
    """Stream text from a run's checkpoint to standard output."""
    config = build(GenerateConfig, tree)
    import torch

    from trainer.generate import stream_text

    for piece in stream_text(config, torch.device("cpu")):
        sys.stdout.write(piece)
        sys.stdout.flush()
    print()
    return 0


def report(tree: dict[str, Any]) -> int:
    """Write the reports of a run directory."""
    config = build(ReportConfig, tree)
    from trainer.report import write_report

    write_report(Path(config.run))
    print(Path(config.run) / "report.html")
    return 0


def export(tree: dict[str, Any]) -> int:
    """Write a checkpoint's weights as safetensors."""
    config = build(ExportConfig, tree)
    import torch

    from trainer.checkpoint import export_safetensors, resolve, verify

    path = resolve(Path(config.run))
    verify(path)
    print(export_safetensors(path, Path(config.out), getattr(torch, config.dtype)))
    return 0


def convert(tree: dict[str, Any]) -> int:
    """Make a run directory to start another model from."""
    config = build(ConvertConfig, tree)
    from cluster.launch import FAILED
    from trainer.checkpoint import CheckpointWriteError
    from trainer.convert import convert_run

    try:
        print(convert_run(config))
    except CheckpointWriteError as error:
        logger.error("%s", error)
        return FAILED
    return 0


def bench(tree: dict[str, Any]) -> int:
    """Measure a suite, print its table, write its rows."""
    config = build(BenchConfig, tree)
    from cluster.accelerators import load_accelerator
    from cluster.env import apply_environment, rank_environment
    from cluster.launch import FAILED
    from trainer.bench import check_suite, run_suite

    accelerator = load_accelerator(config.accelerator.name)
    check_suite(config, accelerator)
    apply_environment(rank_environment(accelerator.deepspeed_name) | {"LOCAL_RANK": "0"})
    try:
        run_suite(config, accelerator)
    except RuntimeError as error:
        logger.error("suite=%s failed: %s", config.suite, error)
        return FAILED
    return 0
