"""YAML and command-line overrides to frozen dataclasses. Unknown keys are errors with their path."""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

T = TypeVar("T")


def read_yaml(path: str | Path, what: str = "recipe", example: str = "output_dir: runs/mine") -> dict[str, Any]:
    """The keys and values of a YAML file; `what` it is and an `example` are for messages.

    Raises:
        ValueError: no such file, not YAML, or something else than keys and values.
    """
    try:
        values = yaml.safe_load(Path(path).read_text()) or {}
    except FileNotFoundError:
        raise ValueError(f"no {what} {path}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}; expected keys and values, such as `{example}`")
    return values


def build(kind: type[T], values: dict[str, Any], overrides: Sequence[str] = (), where: str = "config") -> T:
    """Make a config dataclass of nested values and command-line overrides.

    Raises:
        ValueError: an unknown key or a value of the wrong type; the message has `where` and the dotted path.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    values = _rename(values)
    _refuse_unknown(kind, values, where)
    overrides = [_rename_option(o) for o in overrides]
    for key, text in _options(overrides):
        _refuse_unknown(kind, _nested(key, text), "command line")
        _refuse_new_stage(key, values)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, None)
    try:
        parsed = parser.parse_object(values)
        if overrides:
            parsed = parser.parse_args(list(overrides), namespace=parsed)
        return kind(**vars(parser.instantiate(parsed)))
    except (ArgumentError, TypeError, ValueError) as error:
        said = _ONE_OF.sub(r"expected one of \1; got \2", str(error))
        raise ValueError(f"{where}: {said}") from error


_ONE_OF = re.compile(r"Expected a typing\.Literal\[([^]]*)\]\. Got value: (.*)")  # jsonargparse speaks of Python's types


def _rename(values: Any) -> Any:
    """`from` is a keyword of Python: the field is called `source`."""
    if isinstance(values, dict):
        return {("source" if k == "from" else k): _rename(v) for k, v in values.items()}
    return values


def _rename_option(word: str) -> str:
    """The same for an option's name, and for the keys of a value such as {from: pool}."""
    name, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    try:
        keys = yaml.safe_load(value) if value.lstrip().startswith("{") else None
    except yaml.YAMLError:
        keys = None
    if keys != (renamed := _rename(keys)):
        value = yaml.safe_dump(renamed, default_flow_style=True, width=10**6).strip()
    return ".".join("source" if part == "from" else part for part in name.split(".")) + equals + value


def _options(overrides: Sequence[str]) -> list[tuple[str, str]]:
    """Dotted names and texts of `--name text` and `--name=text`."""
    found: list[tuple[str, str]] = []
    for word in overrides:
        if word.startswith("--"):
            name, _, value = word[2:].partition("=")
            found.append((name, value))
        elif found:
            found[-1] = (found[-1][0], word)
    return found


def _nested(key: str, text: str) -> Any:
    """`a.b` and a text as {a: {b: value}}; of texts only those that hold keys of their own are read."""
    try:
        value = yaml.safe_load(text) if text.lstrip().startswith("{") else None
    except yaml.YAMLError:
        value = None
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _refuse_new_stage(key: str, values: dict[str, Any]) -> None:
    """A mistyped stage would become a new one."""
    parts, stages = key.split("."), values.get("stages")
    if parts[0] == "stages" and len(parts) > 1 and isinstance(stages, dict) and parts[1] not in stages:
        near = difflib.get_close_matches(parts[1], stages, 1)
        hint = f"did you mean stages.{near[0]}?" if near else f"the recipe has {', '.join(stages) or 'no stages'}"
        raise ValueError(f"command line: no stage {parts[1]} in --{key}; {hint}")


def _refuse_unknown(kind: Any, values: Any, where: str, path: str = "") -> None:
    args = [a for a in typing.get_args(kind) if a is not type(None)]
    if typing.get_origin(kind) is dict and isinstance(values, dict):
        for key, value in values.items():
            _refuse_unknown(args[1], value, where, f"{path}{key}.")
    elif args and isinstance(values, dict) and typing.get_origin(kind) is not list:
        _refuse_unknown(args[0], values, where, path)
    elif is_dataclass(kind) and isinstance(values, dict):
        hints = typing.get_type_hints(kind)
        known = [f.name for f in fields(kind)]
        for key, value in values.items():
            if key not in known:
                written = ["from" if name == "source" else name for name in known]
                near = difflib.get_close_matches(str(key), written, 1)
                hint = f"did you mean {path}{near[0]}?" if near else f"known: {', '.join(written)}"
                raise ValueError(f"{where}: unknown key {path}{key}; {hint}")
            _refuse_unknown(hints[key], value, where, f"{path}{key}.")


def to_dict(value: Any) -> Any:
    """A config back to plain values, `from` under its YAML name."""
    if is_dataclass(value):
        return {("from" if f.name == "source" else f.name): to_dict(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, dict):
        return {k: to_dict(v) for k, v in value.items()}
    return [to_dict(v) for v in value] if isinstance(value, list | tuple) else value


def dump(recipe: Any) -> str:
    """A complete YAML of a recipe or study."""
    return yaml.safe_dump(to_dict(recipe), sort_keys=False, allow_unicode=True, width=120)
