"""The environment a rank needs before DeepSpeed, Ray and MLflow are imported."""

import os
import sys
from pathlib import Path


def rank_environment(deepspeed_name: str) -> dict[str, str]:
    """Return the variables of a rank: device family, quiet libraries, tools on PATH."""
    tools = str(Path(sys.executable).parent)  # ninja, for libraries that compile at first use
    path = os.environ.get("PATH", "")
    return {
        "DS_ACCELERATOR": deepspeed_name,
        "PATH": path if tools in path.split(os.pathsep) else tools + os.pathsep + path,
        "HF_HUB_OFFLINE": "1",
        "MLFLOW_DISABLE_TELEMETRY": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "TOKENIZERS_PARALLELISM": "true",
    }


def apply_environment(variables: dict[str, str]) -> None:
    """Set the variables in this process."""
    os.environ.update(variables)
