"""What each verb does with its composed config. Returns the exit code; ValueError is a bad config.

Heavy packages are imported by the verb that needs them, so that a wrong key is refused at once.
"""

import logging
import sys
from pathlib import Path
from typing import Any

from cluster.compose import compose_run
from conf.schema import (
    BenchConfig,
    Config,
    ConvertConfig,
    EvaluateConfig,
    ExportConfig,
    GenerateConfig,
    InspectConfig,
    QuantizeConfig,
    ReportConfig,
    build,
)

logger = logging.getLogger(__name__)


def train(tree: dict[str, Any]) -> int:
    """Check the config, then train: one run, or the stages of a chain."""
    stages = tree.pop("stages", None)
    if stages:
        from cluster.train import train_stages

        return train_stages(tree | {"stages": stages})
    config = build(Config, tree)
    from cluster.train import train_run

    return train_run(config)


def evaluate(tree: dict[str, Any]) -> int:
    """Print what a suite measures of a run's checkpoint."""
    config = build(EvaluateConfig, tree)
    import torch

    from trainer.restore import restore_model

    restored = restore_model(config.run, torch.device("cpu"), spike=config.spike)
    restored.model.prepare_inference()
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


def inspect(tree: dict[str, Any]) -> int:
    """Print one token's spikes before one projection, and what they make of its weights."""
    config = build(InspectConfig, tree)
    import torch

    from trainer.inspection import inspect_spikes

    inspection = inspect_spikes(config, torch.device("cpu"))
    print(inspection.text(config.channels, config.outputs))
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
    from cluster.launch import FAILED
    from trainer.checkpoint import CheckpointWriteError
    from trainer.export import export_run

    try:
        print(export_run(config))
    except CheckpointWriteError as error:
        logger.error("%s", error)
        return FAILED
    return 0


def convert(tree: dict[str, Any]) -> int:
    """Make a run directory to start another model from, and say what it is made of."""
    config = build(ConvertConfig, tree)
    imported = build(Config, compose_run())
    from cluster.launch import FAILED
    from trainer.checkpoint import CheckpointWriteError
    from trainer.convert import convert_run

    try:
        converted = convert_run(config, imported)
    except CheckpointWriteError as error:
        logger.error("%s", error)
        return FAILED
    if config.table:
        print(converted.conversion.tensor_table() + "\n")
    print(converted.conversion.summary_table())
    print(converted.checkpoint)
    return 0


def quantize(tree: dict[str, Any]) -> int:
    """Make a run directory in INT8 and print what that costs."""
    config = build(QuantizeConfig, tree)
    from cluster.launch import FAILED
    from trainer.checkpoint import CheckpointWriteError
    from trainer.quantize import quantize_run

    try:
        checkpoint, table = quantize_run(config)
    except CheckpointWriteError as error:
        logger.error("%s", error)
        return FAILED
    print(table.table())
    if config.table is not None:
        table.save(Path(config.table))
    print(checkpoint)
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
