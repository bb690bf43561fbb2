"""The environment a rank needs before DeepSpeed, Ray and MLflow are imported, and its log."""

import logging
import os
import sys
import warnings
from pathlib import Path


def process_environment() -> dict[str, str]:
    """Return the variables of every process, to be set before PyTorch is imported."""
    variables = {"HYDRA_FULL_ERROR": "1"}  # errors come to us instead of Hydra's exit
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        # Waiting threads spin for milliseconds by default: where other work shares the cores, they
        # take them from the thread they wait for, and a step took ten times as long.
        variables["GOMP_SPINCOUNT"] = "1000"
    # Our message tells of a rank that is gone; PyTorch would warn of each socket, with C++ frames.
    variables["TORCH_CPP_LOG_LEVEL"] = os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR")
    return variables


def rank_environment(deepspeed_name: str, *, is_synchronized: bool = False) -> dict[str, str]:
    """Return the variables of a rank: device family, quiet libraries, tools on PATH.

    Args:
        is_synchronized: the run waits for its communication anyway (parallel.sync).
    """
    tools = str(Path(sys.executable).parent)  # ninja, for libraries that compile at first use
    path = os.environ.get("PATH", "")
    return {
        "DS_ACCELERATOR": deepspeed_name,
        "PATH": path if tools in path.split(os.pathsep) else tools + os.pathsep + path,
        "HF_HUB_OFFLINE": "1",
        "MLFLOW_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "true",
        # Without it NCCL's watchdog ends a process whose time is over before it can say what it
        # waited for (the flight recorder's files do); with it, every wait holds up the host.
        "TORCH_NCCL_BLOCKING_WAIT": os.environ.get(
            "TORCH_NCCL_BLOCKING_WAIT", "1" if is_synchronized else "0"
        ),
    }


def ray_environment() -> dict[str, str]:
    """Return the variables of Ray, for the driver before it imports Ray, and for the workers."""
    noise = "Failed to query Ray Train Controller"  # said every second where no dashboard runs
    return {
        "RAY_AUTH_MODE": os.environ.get("RAY_AUTH_MODE", "token"),  # its ports are open to all
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
        "RAY_COLOR_PREFIX": "0",
        "RAY_DEDUP_LOGS_ALLOW_REGEX": f"^(?!{noise})",
        "RAY_DEDUP_LOGS_SKIP_REGEX": noise,
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
        "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
        "RAY_TRAIN_METRICS_ENABLED": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "3",  # a stopped worker never answers
    }


def apply_environment(variables: dict[str, str]) -> None:
    """Set the variables in this process."""
    os.environ.update(variables)


def configure_logging(rank: int = 0) -> None:
    """Log to standard error, of rank 0 what a person wants to know, of the others warnings."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
    for noisy in ("DeepSpeed", "alembic", "mlflow", "httpx", "filelock", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # DeepSpeed calls functions that PyTorch is about to rename, which no user can change.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    if rank:
        root = logging.getLogger()
        root.setLevel(logging.WARNING)
        for handler in root.handlers:
            handler.setFormatter(logging.Formatter(f"rank {rank}: %(message)s"))
