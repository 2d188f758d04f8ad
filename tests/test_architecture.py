"""The house rules, read off the syntax trees: imports run one way, and no state hides in modules."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from builders import REPO

ENGINE = REPO / "modification"
APP = REPO / "app"

# A module may import those before it, and its own package.
ORDER = (
    "config", "trace", "errors", "threads", "architectures", "routing", "presence", "room", "storage", "slots", "cache",
    "layer", "model", "executor", "fetching", "hub", "integrity", "chat", "loading", "sampling", "batching", "generate",
    "measure", "conversion", "cli",
)
ENTRANCES = ("__init__", "__main__")
TORCH_FREE = ("config", "trace")
RECORDS = ("modification.trace", "modification.measure.cost")


def sources(folder: Path) -> list[Path]:
    """Python files, in a stable order."""
    return sorted(folder.rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """Full names of everything a file imports, wherever in the file; ``from a import b`` gives ``a`` and ``a.b``."""
    package = path.relative_to(REPO).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) + 1 - node.level]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def roots(path: Path) -> set[str]:
    """Top-level packages that a file imports."""
    return {name.split(".")[0] for name in imported(path)}


def place(path: Path) -> str:
    """The name under which a file of the engine stands in ORDER."""
    return path.relative_to(ENGINE).parts[0].removesuffix(".py")


def engine_modules() -> list[Path]:
    """Files of the engine, entrances apart."""
    return [path for path in sources(ENGINE) if place(path) not in ENTRANCES]


def label(path: Path) -> str:
    return path.relative_to(REPO).as_posix()


@pytest.mark.parametrize("path", sources(ENGINE), ids=label)
def test_the_engine_never_imports_the_app(path):
    """Neither gradio nor app; plotly where a bench is drawn."""
    drawing = set() if path.name == "plots.py" else {"plotly"}
    assert not roots(path) & {"gradio", "app", *drawing}


def test_every_module_of_the_engine_has_its_place():
    """A new module is put into the order on purpose."""
    assert {place(path) for path in engine_modules()} <= set(ORDER)


@pytest.mark.parametrize("path", engine_modules(), ids=label)
def test_imports_point_upward_only(path):
    """A module imports those before it in the order; a package's files also each other."""
    allowed = set(ORDER[: ORDER.index(place(path))])
    if path.parent != ENGINE:
        allowed.add(place(path))
    inner = {name.split(".")[1] for name in imported(path) if name.startswith("modification.")}
    assert inner <= allowed


@pytest.mark.parametrize("name", TORCH_FREE)
def test_bookkeeping_imports_no_torch(name):
    """Config and trace are usable where torch is not wanted."""
    assert not roots(ENGINE / f"{name}.py") & {"torch", "transformers"}


@pytest.mark.parametrize("path", sources(APP), ids=label)
def test_the_app_has_one_door_to_the_engine(path):
    """Only the service opens it; the others may read records and formulas, and none but it touches torch."""
    if path.parent != APP / "service":
        assert not roots(path) & {"torch", "transformers"}
        engine = {name for name in imported(path) if name.split(".")[0] == "modification"}
        assert all(name.startswith(RECORDS) for name in engine), engine


@pytest.mark.parametrize("path", sources(ENGINE) + sources(APP), ids=label)
def test_no_global_statement(path):
    """Nothing rebinds a module's names at run time."""
    assert not [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Global)]


@pytest.mark.parametrize("path", sources(ENGINE) + sources(APP), ids=label)
def test_every_file_opens_with_its_purpose(path):
    """A header says what the file is for; only an empty __init__.py needs none."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree) or (path.name == "__init__.py" and not tree.body)


def test_families_are_named_in_one_place():
    """No string or name outside architectures.py spells a family's model type."""
    types = {"llama", "mistral", "qwen2", "qwen3", "gpt2", "gpt_neox"}
    for path in engine_modules():
        if place(path) == "architectures" or path.name == "presets.py":  # whose configs are data
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert node.value not in types, f"{label(path)}, line {node.lineno}"
