"""The arrows of docs/architecture.md hold, and the core needs nothing but torch."""

import ast
import re
import sys

import pytest
from conftest import ROOT

PACKAGE = ROOT / "matryoshka_lora"
CORE_NEEDS = {"torch", "safetensors", "numpy"}


def rooms():
    """Room -> the rooms it may import; None for one that may import everything."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    allowed = {}
    for names, _, targets in re.findall(r"^\| (`.+?) \| (.*?) \| (.*?) ?\|$", text, re.M):
        for name in re.findall(r"`([\w/]+)`", names):
            parts = {part.strip() for part in targets.split(",")} - {""}
            allowed[name] = None if parts == {"everything"} else parts
    return allowed


def room_of(module, known):
    """The most specific room of a module, `evaluation.rows` as a path without the package."""
    path = module.replace(".", "/")
    places = ["/".join(path.split("/")[:n]) for n in range(path.count("/") + 1, 0, -1)]
    return next((place for place in places if place in known), None)


def imports(path, at_once=False):
    """The modules that a file imports, anywhere in it, or `at_once`: when it is imported."""
    tree = ast.parse(path.read_text())
    for node in tree.body if at_once else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                is_module = (ROOT / inner.replace(".", "/")).with_suffix(".py").is_file()
                yield inner if is_module else node.module


FILES = sorted(
    path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.stem != "__init__"
)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_import_is_an_arrow_of_the_page(path):
    allowed = rooms()
    module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
    room = room_of(module, allowed)
    assert room is not None, f"docs/architecture.md has no room for {module}"
    for name in imports(path):
        if name.partition(".")[0] != "matryoshka_lora" or allowed[room] is None:
            continue
        target = name.partition(".")[2]
        if not target:
            continue
        other = room_of(target, allowed)
        assert other is not None, f"docs/architecture.md has no room for {target}"
        exact = {target.replace(".", "/"), other, other.partition("/")[0]}
        ok = other == room or room.startswith(f"{other}/") or other.startswith(f"{room}/")
        assert ok or exact & (allowed[room] or set()), f"{module} ({room}) imports {target}"


def test_the_core_imports_torch_safetensors_and_numpy_alone():
    own = sys.stdlib_module_names | CORE_NEEDS | {"matryoshka_lora"}
    for path in (PACKAGE / "core").glob("*.py"):
        assert {name.partition(".")[0] for name in imports(path)} <= own, path.name


def test_loading_a_run_imports_neither_pandas_nor_matplotlib():
    """Of this package's own files; their imports alone would take more than half a second."""
    seen, todo = set(), ["matryoshka_lora.loading"]
    while todo:
        name = todo.pop()
        seen.add(name)
        path = ROOT / name.replace(".", "/")
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if path.is_file() and name.partition(".")[0] == "matryoshka_lora":
            parents = [name.rpartition(".")[0]] if "." in name else []
            todo += {*imports(path, at_once=True), *parents} - seen
    assert "matryoshka_lora.core.adapter" in seen and "transformers" in seen
    assert not {name.partition(".")[0] for name in seen} & {"pandas", "matplotlib"}


def test_method_names_stand_in_methods_alone():
    names = {path.stem for path in (PACKAGE / "methods").glob("*.py")} & {
        path.stem for path in (ROOT / "configs" / "method").glob("*.yaml")
    }
    assert names
    for path in [*FILES, *(ROOT / "scripts").glob("*.py"), *(ROOT / "hydra_plugins").rglob("*.py")]:
        if (PACKAGE / "methods") in path.parents or path == PACKAGE / "core" / "adapter.py":
            continue  # the second has an initialiser that is called lora
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                sides = [node.left, *node.comparators]
                compared = {side.value for side in sides if isinstance(side, ast.Constant)}
                assert not compared & names, f"{path}:{node.lineno}"
