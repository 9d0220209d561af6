"""Key maps: one table per naming that says which source tensor is which leaf of a model's variables.

The same table loads, saves and verifies: a `Rule` holds a template of source names, a template of
target paths and a `Transform`, and all three work in both directions. A target path is the leaf's
place in the variables joined by slashes, such as `params/stages_0/blocks_1/attn/qkv/kernel`.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from zoo.transforms import Transform, conv, identity, linear, pointwise

Shape = tuple[int, ...]
Bindings = Mapping[str, int]
Resize = Callable[[np.ndarray, Shape, str], np.ndarray]

_PLACEHOLDER = re.compile(r"\{(\w+)([+-]\d+)?(?::0(\d+))?\}")


class KeyMapError(Exception):
    """A key map contradicts itself or its model: a mistake in the table, never in the weights."""


class _Template:
    """A name with integer placeholders, read in both directions."""

    def __init__(self, text: str, spellings: Mapping[str, tuple[str, ...]]):
        self.text = text
        self._parts = []
        pattern, end = "", 0
        for found in _PLACEHOLDER.finditer(text):
            name, offset, width = found[1], int(found[2] or 0), int(found[3] or 0)
            spelled = spellings.get(name)
            if spelled is not None and (offset or width):
                raise KeyMapError(f"template {text!r}: {name!r} is spelled by a table: no offset, no width")
            literal = text[end : found.start()]
            self._parts.append((literal, name, offset, width, spelled))
            value = r"\d+" if spelled is None else "|".join(map(re.escape, spelled))
            pattern += f"{re.escape(literal)}({value})"
            end = found.end()
        self._tail = text[end:]
        if "{" in _PLACEHOLDER.sub("", text):
            raise KeyMapError(f"template {text!r}: placeholders are {{i}}, {{i+1}}, {{i-1}} or {{i:02}}")
        self._pattern = re.compile(pattern + re.escape(self._tail))
        self.names = {name for _, name, *_ in self._parts}

    def render(self, bindings: Bindings) -> str:
        text = ""
        for literal, name, offset, width, spelled in self._parts:
            value = bindings[name]
            text += literal + (f"{value + offset:0{width}d}" if spelled is None else spelled[value])
        return text + self._tail

    def match(self, text: str) -> dict[str, int] | None:
        found = self._pattern.fullmatch(text)
        if found is None:
            return None
        bindings = {}
        for (_, name, offset, _, spelled), value in zip(self._parts, found.groups()):
            bindings[name] = int(value) - offset if spelled is None else spelled.index(value)
        # Rendering again refuses leading zeros, negative indices and one name bound to two values.
        if any(value < 0 for value in bindings.values()) or self.render(bindings) != text:
            return None
        return bindings


@dataclass(frozen=True)
class Rule:
    """Which source tensors make one leaf, for every value of the placeholders.

    Args:
        source: Template of the source's name, or several whose tensors are combined (`q`, `k`, `v`). A
            placeholder is `{i}`, `{i+1}`, `{i-1}` or, with leading zeros, `{i:02}`.
        target: Template of the leaf's path, with the same placeholders.
        transform: How the tensors become the leaf.
        where: For a placeholder, the integers that it may take (`{"i": range(1, 4)}`) or a table
            from its spelling in the source to that in the target
            (`{"t": {"spatial_block": 0, "channel_block": 1}}`).
        resize: For leaves whose shape follows the image size: `resize(array, shape, method)` gets the
            transformed array and gives one of that shape, or raises ValueError saying why it cannot.
        resize_method: The method that the reference takes, where none is asked for.
    """

    source: str | tuple[str, ...]
    target: str
    transform: Transform = identity
    where: Mapping[str, Any] = field(default_factory=dict)
    resize: Resize | None = None
    resize_method: str = "bilinear"

    def __post_init__(self):
        names = self._target.names
        for template in self._sources:
            if template.names != names:
                raise KeyMapError(
                    f"rule {self.source!r} -> {self.target!r}: the placeholders of source and target differ"
                    f" ({sorted(template.names)} and {sorted(names)})"
                )
        if unknown := sorted(set(self.where) - names):
            raise KeyMapError(f"rule {self.source!r} -> {self.target!r}: no placeholder for where= {unknown}")

    @cached_property
    def _sources(self) -> tuple[_Template, ...]:
        spellings = {n: tuple(map(str, v)) for n, v in self.where.items() if isinstance(v, Mapping)}
        sources = (self.source,) if isinstance(self.source, str) else self.source
        return tuple(_Template(text, spellings) for text in sources)

    @cached_property
    def _target(self) -> _Template:
        spellings = {n: tuple(map(str, v.values())) for n, v in self.where.items() if isinstance(v, Mapping)}
        return _Template(self.target, spellings)

    @property
    def placeholders(self) -> set[str]:
        """The names of the placeholders."""
        return self._target.names

    def _allowed(self, bindings: Bindings) -> bool:
        return all(isinstance(v, Mapping) or bindings[n] in v for n, v in self.where.items())

    def match_target(self, path: str) -> dict[str, int] | None:
        """The placeholders' values if `path` is this rule's, else None."""
        bindings = self._target.match(path)
        return bindings if bindings is not None and self._allowed(bindings) else None

    def match_source(self, key: str) -> dict[str, int] | None:
        """The placeholders' values if `key` is one of this rule's source names, else None."""
        for template in self._sources:
            bindings = template.match(key)
            if bindings is not None and self._allowed(bindings):
                return bindings
        return None

    def entry(self, bindings: Bindings) -> "Entry":
        """The leaf and its source names for these values of the placeholders."""
        sources = tuple(template.render(bindings) for template in self._sources)
        return Entry(self._target.render(bindings), self, sources)


@dataclass(frozen=True)
class Entry:
    """One leaf of the variables and where it comes from."""

    path: str
    rule: Rule
    sources: tuple[str, ...]


@dataclass(frozen=True)
class KeyMap:
    """All rules of one naming for one model.

    Args:
        rules: Every source key matches exactly one of them, every leaf too.
        absent_in_source: Target templates of leaves that this naming does not have, each with the value that
            makes the leaf an identity (1 for a scale, 0 for a bias).
        ignore: Source names that carry no parameter, each with the reason; `*` stands for any text.
        classifier: Target templates of the leaves that `num_classes` governs; their last axis is the
            classes. A naming without rules for them is that of checkpoints without a classifier.
        input_conv: Target templates of the kernels whose last but one axis is the image's channels.
        prefix: What every key of the reference begins with, written on saving; the templates leave it out.
            Keys without it are ignored as parts of something else, unless no key has it.
        ema_suffix: What the names of the moving averages end with where raw and averaged weights share a
            file.
    """

    rules: tuple[Rule, ...]
    absent_in_source: Mapping[str, float] = field(default_factory=dict)
    ignore: Mapping[str, str] = field(default_factory=dict)
    classifier: tuple[str, ...] = ()
    input_conv: tuple[str, ...] = ()
    prefix: str = ""
    ema_suffix: str | None = None

    def rule_of_target(self, path: str) -> Entry | None:
        """The rule that writes the leaf at `path` with its source names, or None.

        Raises:
            KeyMapError: If two rules write it.
        """
        rules = (*self._by_target.get(path, ()), *self._by_target[""])
        found = [(rule, bound) for rule in rules if (bound := rule.match_target(path)) is not None]
        if len(found) > 1:
            raise KeyMapError(f"leaf {path!r} is written by two rules: {[rule.source for rule, _ in found]}")
        return found[0][0].entry(found[0][1]) if found else None

    def rule_of_source(self, key: str) -> Entry | None:
        """The rule that reads `key` (without the prefix) with the leaf that it goes into, or None.

        Raises:
            KeyMapError: If two rules read it, or a rule reads it although it is listed as ignored.
        """
        rules = (*self._by_source.get(key, ()), *self._by_source[""])
        found = [(rule, bound) for rule in rules if (bound := rule.match_source(key)) is not None]
        if len(found) > 1:
            raise KeyMapError(f"source key {key!r} matches two rules: {[rule.target for rule, _ in found]}")
        if found and self.ignored(key) is not None:
            raise KeyMapError(f"source key {key!r} is ignored and read for {found[0][0].target!r} as well")
        return found[0][0].entry(found[0][1]) if found else None

    def ignored(self, key: str) -> str | None:
        """Why `key` is left out, or None where it is not."""
        return next((reason for pattern, reason in self._ignore if pattern.fullmatch(key)), None)

    def fill_of(self, path: str) -> float | None:
        """The constant of a leaf that the source does not have, or None."""
        return next((v for t, v in self._absent if t.match(path) is not None), None)

    def is_classifier(self, path: str) -> bool:
        """Whether `num_classes` governs the leaf."""
        return any(t.match(path) is not None for t in self._classifier)

    def is_input_conv(self, path: str) -> bool:
        """Whether the leaf is a kernel over the image's channels."""
        return any(t.match(path) is not None for t in self._input_conv)

    def coverage(self, keys: Iterable[str]) -> int:
        """How many of `keys` a rule reads: the naming of a source is the one with the highest count."""
        names = (key.removeprefix(self.prefix).removesuffix(self.ema_suffix or "") for key in keys)
        return sum(self.rule_of_source(name) is not None for name in names)

    @cached_property
    def has_classifier(self) -> bool:
        """Whether checkpoints of this naming hold a classifier."""
        return any(self.is_classifier(rule.target) for rule in self.rules)

    @cached_property
    def _by_source(self) -> dict[str, list[Rule]]:
        return self._index(lambda rule: (rule.source,) if isinstance(rule.source, str) else rule.source)

    @cached_property
    def _by_target(self) -> dict[str, list[Rule]]:
        return self._index(lambda rule: (rule.target,))

    def _index(self, texts: Callable[[Rule], tuple[str, ...]]) -> dict[str, list[Rule]]:
        """Rules without placeholders by name, all others under the empty name."""
        index: dict[str, list[Rule]] = {"": []}
        for rule in self.rules:
            for text in ("",) if rule.placeholders else texts(rule):
                index.setdefault(text, []).append(rule)
        return index

    @cached_property
    def _ignore(self) -> list[tuple[re.Pattern, str]]:
        return [(re.compile(".*".join(map(re.escape, t.split("*")))), why) for t, why in self.ignore.items()]

    @cached_property
    def _absent(self) -> list[tuple[_Template, float]]:
        return [(_Template(text, {}), value) for text, value in self.absent_in_source.items()]

    @cached_property
    def _classifier(self) -> list[_Template]:
        return [_Template(text, {}) for text in self.classifier]

    @cached_property
    def _input_conv(self) -> list[_Template]:
        return [_Template(text, {}) for text in self.input_conv]


def identity_map(paths: Collection[str], like: KeyMap) -> KeyMap:
    """The key map of variables stored under their own paths, with the special leaves of `like`."""
    rules = tuple(Rule(path, path) for path in paths)
    return KeyMap(rules, classifier=like.classifier, input_conv=like.input_conv)


def torch_linear(source: str, target: str, *, bias: bool = True, **where: Any) -> tuple[Rule, ...]:
    """Rules for a torch `Linear` as a flax `Dense` at module path `target`."""
    return _weight_and_bias(source, target, "kernel", linear, bias, where)


def torch_conv(source: str, target: str, *, bias: bool = True, **where: Any) -> tuple[Rule, ...]:
    """Rules for a torch `Conv2d`, dense or depthwise, as a flax `Conv` at module path `target`."""
    return _weight_and_bias(source, target, "kernel", conv, bias, where)


def torch_pointwise(source: str, target: str, *, bias: bool = True, **where: Any) -> tuple[Rule, ...]:
    """Rules for a torch `Conv2d` of 1x1 as a flax `Dense` at module path `target`."""
    return _weight_and_bias(source, target, "kernel", pointwise, bias, where)


def torch_layer_norm(source: str, target: str, *, bias: bool = True, **where: Any) -> tuple[Rule, ...]:
    """Rules for a torch `LayerNorm` as a flax one at module path `target`."""
    return _weight_and_bias(source, target, "scale", identity, bias, where)


def torch_batch_norm(source: str, target: str, **where: Any) -> tuple[Rule, ...]:
    """Rules for a torch `BatchNorm2d` as a flax one: `num_batches_tracked` is the key map's to ignore."""
    return (
        *torch_layer_norm(source, target, **where),
        Rule(f"{source}.running_mean", f"batch_stats/{target}/mean", where=where),
        Rule(f"{source}.running_var", f"batch_stats/{target}/var", where=where),
    )


def _weight_and_bias(source, target, weight, transform, bias, where) -> tuple[Rule, ...]:
    rules = (Rule(f"{source}.weight", f"params/{target}/{weight}", transform, where),)
    return rules + ((Rule(f"{source}.bias", f"params/{target}/bias", where=where),) if bias else ())


def check_key_map(
    key_map: KeyMap, abstract_variables: Mapping[str, Any], source_shapes: Mapping[str, Shape]
) -> tuple[Rule, ...]:
    """Holds a key map against a model and a reference's names and shapes, both ways.

    Args:
        key_map: The map.
        abstract_variables: The model's variables as `jax.eval_shape(model.init, ...)` gives them.
        source_shapes: Every name of the reference's checkpoint with its shape.

    Returns:
        The rules that nothing used: those of another variant, or left over.

    Raises:
        KeyMapError: Listing every leaf that is written by none or two rules, every source key read by none or
            two, and every shape that does not fit.
    """
    problems, wanted, used = [], {}, set()
    for path, leaf in flatten(abstract_variables).items():
        try:
            entry = key_map.rule_of_target(path)
            if entry is None:
                if key_map.fill_of(path) is None and not key_map.is_classifier(path):
                    problems.append(f"no rule writes leaf {path}")
                continue
            if key_map.fill_of(path) is not None:
                problems.append(f"leaf {path} has a rule and is declared absent in the source")
            used.add(id(entry.rule))
            shapes = entry.rule.transform.source_shapes(tuple(leaf.shape))
            for name, shape in zip(entry.sources, shapes, strict=True):
                if name in wanted:
                    problems.append(f"source {name} goes into {path} and into {wanted[name][0]}")
                wanted[name] = (path, shape)
        except (KeyMapError, ValueError) as error:
            problems.append(f"leaf {path}: {error}")
    for full, shape in source_shapes.items():
        key = full.removeprefix(key_map.prefix)
        try:
            entry = key_map.rule_of_source(key)
        except KeyMapError as error:
            problems.append(str(error))
            continue
        if entry is None and key_map.ignored(key) is None and full.startswith(key_map.prefix):
            problems.append(f"no rule reads source {full} {tuple(shape)}")
        elif entry is not None and key not in wanted:
            problems.append(f"source {full} {tuple(shape)} is for leaf {entry.path}, which does not exist")
        elif entry is not None and wanted[key][1] != tuple(shape):
            problems.append(f"source {full} {tuple(shape)}: leaf {wanted[key][0]} wants {wanted[key][1]}")
    present = {full.removeprefix(key_map.prefix) for full in source_shapes}
    for name, (path, _) in wanted.items():
        if name not in present:
            problems.append(f"source {name} for leaf {path} is missing")
    if problems:
        raise KeyMapError("the key map does not fit:\n  " + "\n  ".join(problems))
    return tuple(rule for rule in key_map.rules if id(rule) not in used)


def flatten(tree: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one dict from paths with slashes to leaves."""
    flat = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}/") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree
