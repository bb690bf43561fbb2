"""One line for a wrong config: the key, what was given, what is required, what would work."""

import difflib
import re
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue
from pydantic import ValidationError

from conf.schema import StageError


def describe(error: Exception, verb: str) -> str:
    """Return a message for a person; `verb` names the config the command was composed from."""
    if isinstance(error, StageError):
        return f"stages.{error.stage}: {describe(error.error, verb)}"
    if isinstance(error, ValidationError):
        defaults = _defaults(verb)
        lines = [line for item in error.errors() for line in _item_lines(item, (), defaults)]
        return "\n  ".join(lines)
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} is required and was not given; add {error.full_key}=..."
    text = str(error).strip()
    unknown = re.search(r"Could not override '([^']+)'", text)
    if unknown:
        return _unknown_key(unknown[1], _defaults(verb))
    choice = re.search(r"Could not find '([^']+)/([^/']+)'\s+Available options in '[^']+':", text)
    if choice:
        group, name = choice.groups()
        names = ", ".join(text[choice.end() :].partition("Config search path:")[0].split())
        return f"{group}={name}: no such choice; there is {names}"
    if isinstance(error, HydraException) and error.__cause__ is not None:
        text += f" ({str(error.__cause__).splitlines()[0]})"
    text = text.partition("Config search path:")[0].strip()
    return re.sub(r"\n\s*\n", "\n", text)


def _item_lines(item: Any, prefix: tuple[str | int, ...], defaults: dict[str, Any]) -> list[str]:
    """Lines for one of pydantic's errors, those inside an extension's config unfolded."""
    place = (*prefix, *item["loc"])
    inner = item.get("ctx", {}).get("error")
    if isinstance(inner, ValidationError):
        return [line for sub in inner.errors() for line in _item_lines(sub, place, defaults)]
    key = ".".join(map(str, place))
    if item["type"] == "unexpected_keyword_argument":
        return [_unknown_key(key, defaults)]
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "missing":
        return [f"{key} is required and was not given"]
    default, given = defaults.get(key), item["input"]
    if isinstance(given, dict):  # a check across fields, whose message begins with one of them
        return [f"{key}.{message}"]
    remedy = f"; {key}={default} works" if default is not None and default != given else ""
    return [f"{key}={given!r}: {message[0].lower()}{message[1:]}{remedy}"]


def _unknown_key(key: str, defaults: dict[str, Any]) -> str:
    section = key.rpartition(".")[0]
    sections = dict.fromkeys(k[: k.index(".")] for k in defaults if "." in k)
    known = [*sections, *defaults]
    near = difflib.get_close_matches(key, known, n=3, cutoff=0.6)
    siblings = [k for k in known if k.rpartition(".")[0] == section]
    names = ", ".join(near or siblings[:20])
    return f"{key}: no such key; there is {names}" if names else f"{key}: no such key"


def _defaults(verb: str) -> dict[str, Any]:
    """Return the verb's keys with their default values."""
    GlobalHydra.instance().clear()
    with initialize_config_module("conf", version_base="1.3"):
        tree = OmegaConf.to_container(compose(verb), resolve=False)
    assert isinstance(tree, dict)
    flat: dict[str, Any] = {}

    def visit(value: Any, key: str) -> None:
        flat[key] = value
        if isinstance(value, dict):
            for name, item in value.items():
                visit(item, f"{key}.{name}" if key else str(name))

    visit(tree, "")
    flat.pop("")
    return {k: v for k, v in flat.items() if not isinstance(v, dict)}
