"""Which YAML file defines an evaluation task or group, and what it says.

The only place that knows how the harness lays out and reads its task files.
"""

import difflib
import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import lm_eval.tasks
from lm_eval.config.group import GroupConfig
from lm_eval.tasks import TaskManager

# Private in lm-eval 0.4.13, and the only reader that resolves a task's includes and functions.
from lm_eval.tasks._yaml_loader import load_yaml

from matryoshka_lora.core.errors import UserError

OWN_TASKS = Path(__file__).parents[1] / "assets" / "tasks"


@dataclass(frozen=True)
class Definition:
    """A task's config, or a group's config with its members."""

    config: dict[str, Any]
    members: tuple["Definition", ...] | None = None


def definition(name: str) -> Definition:
    """The definition behind a registered name: a task, a group, a tag, or one of the package's own.

    Raises UserError with the nearest names if there is none.
    """
    return _build(name, _index_with(name), {})


def is_own(name: str) -> bool:
    """Whether the task is the package's, not the harness's."""
    return name in _index_of(OWN_TASKS)


@functools.cache
def _index_of(folder: Path) -> Mapping[str, Any]:
    """Names that the YAML files below `folder` define -> entries of the harness's index."""
    return TaskManager(include_path=folder, include_defaults=False).task_index


@functools.cache
def _registered() -> tuple[dict[str, Path], dict[str, set[Path]]]:
    """Task or group -> the top folder of the installed harness that defines it; tag -> folders.

    Found by a search in the files' text, in about a second: the harness's own index of its 14,000
    files takes ten, while that of one top folder takes a tenth.
    """
    root = Path(lm_eval.tasks.__file__).parent
    scalar = re.compile(r"""^["']?(task|group|tag)["']?[ \t]*:[ \t]*["']?([^"'\s#\[]+)""", re.M)
    listed = re.compile(r"""^["']?tag["']?[ \t]*:[ \t]*\n((?:[ \t]*-[ \t]*\S+[ \t]*\n)+)""", re.M)
    names: dict[str, Path] = {}
    tags: dict[str, set[Path]] = {}
    for path in sorted(root.glob("*/**/*yaml"), key=Path.as_posix):
        folder = root / path.relative_to(root).parts[0]
        text = path.read_text(encoding="utf-8", errors="replace")
        found = [name for kind, name in scalar.findall(text) if kind == "tag"]
        for lines in listed.findall(text):
            found += [line.strip(" \t-\"'") for line in lines.splitlines()]
        for tag in found:
            tags.setdefault(tag, set()).add(folder)
        if path.suffix == ".yaml":  # the others are templates that files include
            for kind, name in scalar.findall(text):
                if kind != "tag":
                    names.setdefault(name, folder)
    return names, tags


def _index_with(name: str) -> Mapping[str, Any]:
    """An index of the harness that holds `name` and all that it is made of."""
    own = _index_of(OWN_TASKS)
    if name in own:
        return own
    names, tags = _registered()
    if name in names and _complete(name, names[name]):
        return _index_of(names[name])
    if name in names or name in tags:
        index = _index_of(Path(lm_eval.tasks.__file__).parent)
        if name in index:
            return index
    close = difflib.get_close_matches(name, sorted({*own, *names, *tags}), n=5, cutoff=0.5)
    hint = f"; nearest: {', '.join(close)}" if close else ""
    raise UserError(f"evaluation task {name!r} is unknown to lm-eval{hint}")


def _complete(name: str, folder: Path) -> bool:
    """Whether all that `name` refers to is defined below `folder`."""
    index = _index_of(folder)
    if name not in index:
        return False
    entry = index[name]
    if entry.kind.name == "TAG":
        return _registered()[1].get(name) == {folder}
    if entry.kind.name != "GROUP":
        return True
    members = _as_list(load_yaml(entry.yaml_path)["task"])
    names = [m if isinstance(m, str) else m.get("group", m.get("task")) for m in members]
    return all(_complete(member, folder) for member in names)


def _build(name: str, index: Mapping[str, Any], overrides: dict[str, Any]) -> Definition:
    """The config behind a registered name, put together as the harness's own factory does it."""
    entry = index[name]
    if entry.kind.name == "TAG":
        members = [_build(n, index, {**overrides, "task": n}) for n in sorted(entry.tags)]
        return Definition({}, tuple(members))
    try:
        config = load_yaml(entry.yaml_path, resolve_func=True)
    except ImportError as error:  # of the functions that its YAML names
        raise UserError(
            f"task {name} needs a package that is not installed: {str(error).splitlines()[0]}"
        ) from None
    if entry.kind.name == "GROUP":
        return _build_group(name, config, index, overrides)
    return Definition({**config, **overrides})


def _build_group(
    name: str, config: dict[str, Any], index: Mapping[str, Any], overrides: dict[str, Any]
) -> Definition:
    known = {field.name for field in fields(GroupConfig)}
    overrides = {**{k: v for k, v in config.items() if k not in known}, **overrides}
    members = []
    for item in _as_list(config.get("task")):
        if isinstance(item, str):
            item = {"task": item}
        given = {**overrides, **{k: v for k, v in item.items() if k != "group"}}
        if "group" in item and item["group"] in index:
            members.append(_build(item["group"], index, given))
        elif "group" in item:
            members.append(_build_group(f"{name}::{item['group']}", item, index, overrides))
        elif item["task"] in index:
            if index[item["task"]].kind.name == "GROUP":
                del given["task"]
            members.append(_build(item["task"], index, given))
        else:
            members.append(Definition({**given, "task": f"{name}::{item['task']}"}))
    own = {k: v for k, v in config.items() if k in known}
    return Definition({**own, "group": name}, tuple(members))


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]
