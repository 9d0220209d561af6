"""Configs: read from a file, changed on the command line, checked, compared when a run goes on.

A config file holds `get_config(arg)` and returns an `ml_collections.ConfigDict` with only what differs from
`default()`; `train/schema.py` has the keys. The command line goes last: `--config.optim.lr=1e-3`.
"""

import ast
import dataclasses
import difflib
import fnmatch
import functools
import importlib.util
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

from train.schema import FREE, ConfigError, default, flatten, nearest, validate

Config = ml_collections.ConfigDict | Mapping

FLAG = "--config."

# What may change when a run goes on: how long, how often and on how many chips, not what is computed.
RESUMABLE = (
    "total_steps",
    "eval_every",
    "log_every",
    "checkpoint.*",
    "data.workers",
    "data.prefetch",
    "mesh.*",
    "profile.*",
)


def load(spec: str, overrides: Sequence[str] = ()) -> ml_collections.FrozenConfigDict:
    """Reads a config file, lays the command line over it and checks the whole.

    Args:
        spec: a file and the argument of its `get_config`, `"configs/digits.py:davit_nano"`. The file is
            looked up from the current directory, then among the installed configs; without a colon the
            argument is None.
        overrides: command-line words, `["--config.optim.lr=1e-3"]` or `["--config.optim.lr", "1e-3"]`. Text
            is read as the type of the key: `true`/`false`, `0.9,0.999` or `(0.9,0.999)`, `None` where that is
            allowed. Under `model.overrides` it is a Python literal if it is one, else text. The last one for
            a key wins.

    Returns:
        All keys of `default()`, frozen; `ml_collections.ConfigDict(config)` gives one that can be changed.

    Raises:
        ConfigError: for a missing file, an unknown key, a value of the wrong type or out of range.
    """
    values = flatten(default())
    for path, value in flatten(_read(spec)).items():
        if not _is_empty_section(path, value):
            values[path] = _kind(path).check(path, value)
    return _overlaid(values, overrides)


def overlay(config: Config, overrides: Sequence[str]) -> ml_collections.FrozenConfigDict:
    """A complete config, such as that of a run, with words of the command line laid over it, checked again.

    Raises:
        ConfigError: as `load` does.
    """
    return _overlaid(flatten(default()) | _complete(config), overrides)


def _overlaid(values: dict[str, Any], overrides: Sequence[str]) -> ml_collections.FrozenConfigDict:
    for path, text in _words(overrides):
        kind = _kind(path)
        values[path] = kind.check(path, kind.read(text))
    config = ml_collections.ConfigDict(_nest(values))
    validate(config)
    return ml_collections.FrozenConfigDict(config)


def table(spec: str) -> tuple[str, tuple[str, ...]]:
    """A config file, and the arguments of its `get_config` that are the rows of one of its tables.

    Args:
        spec: a file and the name of a table, a key of its `TABLES`: `"configs/text.py:miras"`.

    Raises:
        ConfigError: for a missing file or an unknown table.
    """
    name, _, wanted = spec.rpartition(":")
    tables = getattr(_module(_find(name or wanted)), "TABLES", {})
    if not name or wanted not in tables:
        raise ConfigError(f"{spec!r} names no table{nearest(wanted, tables)}" if tables else f"{spec} has no TABLES")
    return name, tuple(tables[wanted])


def contrasts(spec: str) -> tuple[tuple[str, str], ...]:
    """Pairs of rows that are compared, `CONTRASTS` of a config file; `spec` as of `table`. Rows may have seeds."""
    name, _, _ = spec.rpartition(":")
    return tuple(getattr(_module(_find(name)), "CONTRASTS", ()))


def plain(config: Config) -> dict[str, Any]:
    """The config as nested dicts, lists and scalars, equal to what its JSON text reads back as."""
    return _nest({path: _lists(value) for path, value in flatten(config).items()})


def describe(config: Config) -> str:
    """The config as canonical JSON: sorted keys, the same text for equal configs."""
    return json.dumps(plain(config), sort_keys=True, indent=2, allow_nan=False)


def differences(a: Config, b: Config) -> tuple[str, ...]:
    """Dotted paths, sorted, in which two configs differ.

    Both may be configs or the dicts that their JSON reads back as. A key that only one of them has is
    compared with its default, so that a run from before the key was introduced can go on.
    """
    a, b = _complete(a), _complete(b)
    return tuple(sorted(path for path in a.keys() | b.keys() if a.get(path) != b.get(path)))


def check_resume(saved: Config, given: Config) -> tuple[str, ...]:
    """Checks that a run with the config `given` may go on from a checkpoint that was made with `saved`.

    Returns:
        The paths that differ, all of them `RESUMABLE`.

    Raises:
        ConfigError: where anything else differs, with both values.
    """
    paths = differences(saved, given)
    fixed = [path for path in paths if not any(fnmatch.fnmatchcase(path, pattern) for pattern in RESUMABLE)]
    if fixed:
        before, now = _complete(saved), _complete(given)
        lines = [f"  {path}: {before.get(path)!r} there, {now.get(path)!r} now" for path in fixed]
        raise ConfigError(
            "the checkpoints in this workdir belong to a run with another config:\n"
            + "\n".join(lines)
            + "\ngo on with the values of that run, or take another workdir; "
            + f"what may change: {', '.join(RESUMABLE)}"
        )
    return paths


def _read(spec: str) -> ml_collections.ConfigDict:
    """What `get_config` of the file returns."""
    name, colon, arg = spec.rpartition(":")
    name, arg = (name, arg) if colon else (spec, None)
    path = _find(name)
    module = _module(path)
    if not hasattr(module, "get_config"):
        raise ConfigError(f"{path} has no function get_config(arg)")
    try:
        config = module.get_config(arg)
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from error
    if not isinstance(config, ml_collections.ConfigDict):
        raise ConfigError(f"{name}: get_config must return a ConfigDict, got {type(config).__name__}")
    return config


def _module(path: pathlib.Path) -> Any:
    """The config file, run."""
    module_spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return module


def _find(name: str) -> pathlib.Path:
    """The config file of this name, from the current directory or installed beside this package."""
    installed = pathlib.Path(__file__).parent.parent / "configs"
    for path in (pathlib.Path(name), installed.parent / name, installed / name):
        if path.suffix == ".py" and path.is_file():
            return path
    known = sorted(f"configs/{path.name}" for path in installed.glob("*.py") if path.stem != "__init__")
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise ConfigError(f"no config file {name!r}; {hint}There are: {', '.join(known) or 'none installed'}")


def _words(overrides: Sequence[str]) -> list[tuple[str, str]]:
    """Splits command-line words into (dotted path, text)."""
    pairs, words = [], list(overrides)
    while words:
        word = words.pop(0)
        if not word.startswith(FLAG):
            raise ConfigError(f"unexpected argument {word!r}; config keys are set with {FLAG}KEY=VALUE")
        path, equals, text = word.removeprefix(FLAG).partition("=")
        if not equals:
            if not words or words[0].startswith("--"):
                raise ConfigError(f"{word} has no value; write {word}=VALUE")
            text = words.pop(0)
        pairs.append((path, text))
    return pairs


@dataclasses.dataclass(frozen=True)
class _Kind:
    """The values of a key: `base` (None: any plain value), the type of a tuple's elements, None allowed."""

    base: type | None
    element: type | None = None
    optional: bool = False

    def __str__(self) -> str:
        if self.base is None:
            return "a number, text, true, false, None or a tuple of those"
        words = {bool: "true or false", int: "an integer", float: "a finite number", str: "text"}
        text = f"a tuple, each {words[self.element]}" if self.base is tuple else words[self.base]
        return text + " or None" * self.optional

    def read(self, text: str) -> Any:
        """The value that a word on the command line most likely stands for; `check` decides."""
        word = text.strip().lower()
        if word in ("none", "null") and (self.optional or self.base is None):
            return None
        if word in ("true", "false") and self.base in (bool, None):
            return word == "true"
        try:
            if self.base in (int, float):
                return self.base(text)
            if self.base in (tuple, None):
                value = ast.literal_eval(text)
                return value if self.base is None or isinstance(value, (tuple, list)) else (value,)
        except (ValueError, SyntaxError):
            if self.base is tuple:
                return tuple(part.strip() for part in text.split(",") if part.strip())
        return text

    def check(self, path: str, value: Any) -> Any:
        """The value, if it is of this kind; an int becomes a float and a list a tuple.

        Raises:
            ConfigError: if it is of another kind.
        """
        try:
            if value is None and self.optional:
                return None
            if self.base is tuple:
                return tuple(_scalar(self.element, item) for item in _sequence(value))
            return _plain_value(value) if self.base is None else _scalar(self.base, value)
        except TypeError:
            raise ConfigError(f"{path} must be {self}, got {value!r}") from None


def _scalar(base: type, value: Any) -> Any:
    if base is float and type(value) is int:
        value = float(value)
    if type(value) is not base or (base is float and not math.isfinite(value)):
        raise TypeError
    return value


def _sequence(value: Any) -> tuple | list:
    if not isinstance(value, (tuple, list)):
        raise TypeError
    return value


def _plain_value(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return tuple(_plain_value(item) for item in value)
    base = type(value) if type(value) in (bool, int, str) else float
    return None if value is None else _scalar(base, value)


@functools.cache
def _kinds() -> dict[str, _Kind]:
    """The kind of every key of `default()` by path; the elements of a tuple that is empty there are text."""
    config = default()
    kinds = {}
    for path, value in flatten(config).items():
        if path not in FREE:
            *sections, key = path.split(".")
            base = functools.reduce(getattr, sections, config).get_type(key)
            element = type(next(iter(value), "")) if base is tuple else None
            kinds[path] = _Kind(base, element, optional=value is None)
    return kinds


def _kind(path: str) -> _Kind:
    """The kind of the key at a dotted path; an unknown one raises `ConfigError` with the nearest."""
    section = path.rpartition(".")[0]
    if section in FREE:
        return _Kind(FREE[section])
    kinds = _kinds()
    if path not in kinds:
        inside = [known for known in [*kinds, *FREE] if known.startswith(f"{path}.")]
        if inside:
            raise ConfigError(f"{path} is a section, not a value; set {', '.join(inside)}")
        if path in FREE:
            raise ConfigError(f"{path} is a section, not a value; set {path}.NAME")
        raise ConfigError(f"unknown key {path!r}{nearest(path, kinds)}")
    return kinds[path]


def _is_empty_section(path: str, value: Any) -> bool:
    return value == {} and any(known.startswith(f"{path}.") or known == path for known in [*_kinds(), *FREE])


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    nested: dict[str, Any] = {}
    for path, value in flat.items():
        *sections, key = path.split(".")
        part = functools.reduce(lambda part, name: part.setdefault(name, {}), sections, nested)
        if value == {}:
            part.setdefault(key, {})
        else:
            part[key] = value
    return nested


def _lists(value: Any) -> Any:
    return [_lists(item) for item in value] if isinstance(value, tuple) else value


def _complete(config: Config) -> dict[str, Any]:
    """Dotted path -> value, with the default where the config lacks a key."""
    return {path: value for path, value in (flatten(default()) | flatten(config)).items() if value != {}}
