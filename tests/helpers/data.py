"""The section `data` of a group of conf/data."""

from pathlib import Path
from typing import Any

import yaml

import conf
from conf.schema import DataConfig, build


def load_data_group(name: str, **changes: Any) -> DataConfig:
    """Return conf/data/<name>.yaml with other values for some keys."""
    file = Path(conf.__file__).parent / "data" / f"{name}.yaml"
    return build(DataConfig, yaml.safe_load(file.read_text()) | changes)
