"""Strict building of typed config from a plain tree, and the types of its numbers."""

import importlib
import json
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter
from pydantic.dataclasses import is_pydantic_dataclass

STRICT = ConfigDict(strict=True, extra="forbid")

Section = TypeVar("Section")

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Ratio = Annotated[float, Field(ge=0, le=1)]


class StageError(ValueError):
    """What is wrong with one stage of a chain.

    Args:
        stage: its name.
        error: as it would be of a run by itself.
    """

    def __init__(self, stage: str, error: ValueError) -> None:
        super().__init__(f"stages.{stage}: {error}")
        self.stage, self.error = stage, error


def build(cls: type[Section], tree: dict[str, Any]) -> Section:
    """Validate a plain tree against a config class.

    Raises:
        pydantic.ValidationError: every unknown, missing, mistyped or illegal key, with its path.
    """
    # In strict mode only JSON may stand for nested dataclasses.
    return TypeAdapter(cls).validate_json(json.dumps(tree))


def extension(package: str) -> BeforeValidator:
    """Build a config that an extension file defines and its YAML names by `_target_`.

    Only strict config dataclasses inside `package` are accepted, so that reading a config never
    runs foreign code.
    """

    def load(value: Any) -> Any:
        if type(value).__module__.startswith(package + "."):
            return value  # built before
        if not isinstance(value, dict) or not isinstance(value.get("_target_"), str):
            raise ValueError(f"needs a `_target_` naming a config class in {package}")
        module, _, name = value["_target_"].rpartition(".")
        if not module.startswith(package + "."):
            raise ValueError(f"_target_ {value['_target_']!r} is outside {package}")
        try:
            cls = getattr(importlib.import_module(module), name, None)
        except ModuleNotFoundError as error:
            if not module.startswith(str(error.name)):
                raise
            cls = None
        if not isinstance(cls, type) or not is_pydantic_dataclass(cls):
            raise ValueError(f"_target_ {value['_target_']!r} names no config class")
        return build(cls, {key: item for key, item in value.items() if key != "_target_"})

    return BeforeValidator(load)
