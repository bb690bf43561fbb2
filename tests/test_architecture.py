"""Imports point downwards, every heavy dependency stays at home, no file is too long."""

import ast
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = ("conf", "ops", "parallel", "models", "trainer", "cluster")
UPWARD = {("trainer/__main__.py", "cluster")}
HOMES = {
    "triton": ("ops/*/triton_*.py", "ops/triton_*.py"),
    "deepspeed": ("parallel/engine*.py", "parallel/pipeline_engine.py"),
    "ray": ("cluster/*",),
    "hydra": ("cluster/*",),
    "omegaconf": ("cluster/*",),
    "mlflow": ("trainer/tracking.py",),
    "safetensors": ("trainer/checkpoint*.py", "models/*"),
    "gguf": ("models/io/*",),
    "tokenizers": ("models/io/*", "trainer/data/tokenizer.py"),
    "transformers": ("trainer/bench*", "trainer/data/chat.py"),
    "torch.cuda": ("cluster/accelerators/cuda.py",),
    "torch.distributed": ("parallel/*",),
    "os.environ": ("cluster/env.py", "parallel/mesh.py"),
    "os.getenv": (),
    "print": ("cluster/verbs.py", "cluster/cli.py", "trainer/bench*"),
}
MAX_LINES = 400
FILES = [path for layer in LAYERS for path in sorted((ROOT / layer).rglob("*.py"))]
IDS = [path.relative_to(ROOT).as_posix() for path in FILES]


def imports(tree: ast.AST) -> Iterator[str]:
    """Yield the dotted name of everything that is imported, wherever in the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def uses(tree: ast.AST) -> Iterator[str]:
    """Yield imports, `module.attribute` and the names of called functions."""
    yield from imports(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield f"{node.value.id}.{node.attr}"
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            yield node.func.id


@pytest.mark.parametrize("file", IDS)
def test_imports_point_downwards(file: str) -> None:
    own = LAYERS.index(file.split("/")[0])
    for name in imports(ast.parse((ROOT / file).read_text())):
        package = name.split(".")[0]
        if package in LAYERS and (file, package) not in UPWARD:
            assert LAYERS.index(package) <= own, f"{file} imports {name}, which is above it"
        assert package != "tests", f"{file} imports {name}"
        if package == "conf":
            assert name.startswith("conf.schema"), (
                f"{file} imports {name}; only conf.schema is code"
            )


@pytest.mark.parametrize("file", IDS)
def test_heavy_dependencies_stay_in_their_homes(file: str) -> None:
    for name in uses(ast.parse((ROOT / file).read_text())):
        for dependency, homes in HOMES.items():
            if name == dependency or name.startswith(dependency + "."):
                assert any(fnmatch(file, home) for home in homes), (
                    f"{file} uses {name}, whose home is {' or '.join(homes) or 'nowhere'}"
                )


@pytest.mark.parametrize("file", IDS)
def test_files_stay_within_the_size_budget(file: str) -> None:
    lines = len((ROOT / file).read_text().splitlines())
    assert lines <= MAX_LINES, f"{file} has {lines} lines of {MAX_LINES}; split it by concern"
