"""The `longaxon` command: each verb is a Hydra application over conf/<verb>.yaml.

Config errors end with exit code 2 and one line, before any process or device is touched.
"""

import re
import sys
from collections.abc import Callable
from typing import Any

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cluster import verbs
from cluster.env import apply_environment, configure_logging, process_environment
from cluster.errors import describe

WRONG_CONFIG, INTERRUPTED = 2, 130

VERBS: dict[str, tuple[Callable[[dict[str, Any]], int], str]] = {
    "train": (verbs.train, "train a model; the same command continues a run that was cut short"),
    "evaluate": (verbs.evaluate, "measure a run's checkpoint: perplexity, recall, spikes, lm-eval"),
    "generate": (verbs.generate, "stream text from a run's checkpoint"),
    "inspect": (verbs.inspect, "show one token's spikes and integer products in one projection"),
    "report": (verbs.report, "write report.json and report.html of a run directory"),
    "export": (verbs.export, "write a checkpoint's weights as safetensors"),
    "convert": (verbs.convert, "import a checkpoint, or remap a run's layers, to start a run from"),
    "quantize": (verbs.quantize, "make INT8 of a run's weights, keys and values, for inference"),
    "bench": (verbs.bench, "measure, next to a peer where there is one"),
}

QUIET = (
    "hydra.run.dir=.",
    "hydra.sweep.dir=.",
    "hydra.sweep.subdir=.",
    "hydra.output_subdir=null",
    "hydra/job_logging=none",
    "hydra/hydra_logging=none",
)
"""The run directory is ours; Hydra writes none."""


def main() -> None:
    """Run the verb named on the command line and exit with its code."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run `longaxon <arguments>` and return the exit code."""
    configure_logging()
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0 if arguments else WRONG_CONFIG
    if arguments[0] not in VERBS:
        print(f"longaxon: no verb {arguments[0]!r}\n{_usage()}", file=sys.stderr)
        return WRONG_CONFIG
    verb, *overrides = arguments
    apply_environment(process_environment())
    try:
        return _run_verb(verb, overrides)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        print(f"longaxon {verb}: {describe(error, verb)}", file=sys.stderr)
        return WRONG_CONFIG
    except KeyboardInterrupt:
        print(f"longaxon {verb}: interrupted; the same command continues", file=sys.stderr)
        return INTERRUPTED


def _run_verb(verb: str, overrides: list[str]) -> int:
    """Compose the verb's config and run it (each job of it, with --multirun)."""
    codes: list[int] = []
    wrong: list[Exception] = []

    @hydra.main(version_base="1.3", config_path="pkg://conf", config_name=verb)
    def job(config: DictConfig) -> None:
        try:
            tree = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
            assert isinstance(tree, dict), "a verb's config is a mapping"
            codes.append(VERBS[verb][0]({str(key): value for key, value in tree.items()}))
        except (OmegaConfBaseException, ValueError) as error:
            wrong.append(error)  # kept from Hydra, which would add a line of its own

    overrides = [_quote_prompt(override) for override in overrides]
    quiet = [] if _asks_hydra(overrides) else list(QUIET)
    # Hydra wants all overrides in one piece, options before or after it.
    first = next((i for i, o in enumerate(overrides) if "=" in o and o[0] != "-"), 0)
    sys.argv = [f"longaxon {verb}", *overrides[:first], *quiet, *overrides[first:]]
    job()
    if wrong:
        raise wrong[0]
    return max(codes, default=0)


def _quote_prompt(override: str) -> str:
    """Quote the text of `prompt=...` for Hydra, to which spaces and most signs matter."""
    key, _, text = override.partition("=")
    if key != "prompt" or (len(text) > 1 and text[0] in "'\"" and text[-1] == text[0]):
        return override
    # Backslashes count only before a quote, where they are doubled.
    text = re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + (r"\'" if m[2] else ""), text)
    return f"prompt='{text}'"


def _asks_hydra(overrides: list[str]) -> bool:
    return any(o in ("--help", "-h", "--hydra-help", "--version") for o in overrides)


def _usage() -> str:
    lines = [f"  {verb:10s}{text}" for verb, (_, text) in VERBS.items()]
    return "\n".join(
        [
            "usage: longaxon <verb> [key=value ...]     (longaxon <verb> --help lists the keys)",
            *lines,
        ]
    )
