"""Fits the tensors of a source to the leaves of a model, and collects everything that does not fit."""

import difflib
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from zoo.errors import WeightsError
from zoo.formats.readers import Source
from zoo.keymap import Entry, KeyMap, KeyMapError

_HINTED = 20


class Names:
    """The tensors of a source under the names of a key map's templates.

    Attributes:
        arrays: name, without the key map's prefix, -> tensor.
        weights: `"ema"` or `"raw"` where the source holds both, else None.
        ignored: reason -> source keys that this key map leaves out.
    """

    def __init__(self, key_map: KeyMap, source: Source, weights: str | None):
        self.key_map = key_map
        self.arrays: dict[str, np.ndarray] = {}
        self.weights = source.weights
        self.ignored: dict[str, list[str]] = defaultdict(list)
        self._prefix = key_map.prefix if any(key.startswith(key_map.prefix) for key in source.arrays) else ""
        found = {}
        for key, array in source.arrays.items():
            if key.startswith(self._prefix):
                found[key.removeprefix(self._prefix)] = array
            else:
                self.ignored[f"outside {self._prefix!r}"].append(key)
        self._choose(found, weights)
        if weights == "ema" and self.weights is None:
            raise WeightsError(f"weights='ema': {source.path or 'the mapping'} holds no moving average")
        self.entries: dict[str, Entry] = {}
        for name in list(self.arrays):
            if (entry := key_map.rule_of_source(name)) is not None:
                self.entries[name] = entry
            elif (reason := key_map.ignored(name)) is not None:
                self.ignored[reason].append(self.full(name))
                del self.arrays[name]

    def _choose(self, found: Mapping[str, np.ndarray], weights: str | None) -> None:
        """Takes moving averages in place of raw tensors, or leaves them out."""
        suffix = self.key_map.ema_suffix
        shadows = [name for name in found if suffix and name.endswith(suffix)]
        if shadows:
            self.weights = weights or "ema"
        averaged = {name.removesuffix(suffix) for name in shadows} if self.weights == "ema" else set()
        for name, array in found.items():
            if name in shadows and self.weights == "ema":
                self.arrays[name.removesuffix(suffix)] = array
            elif name in shadows:
                self.ignored["the moving average of raw weights"].append(self.full(name))
            elif name in averaged:
                self.ignored["raw weights of which there is a moving average"].append(self.full(name))
            else:
                self.arrays[name] = array

    def full(self, name: str) -> str:
        """The name as the source spells it."""
        return self._prefix + name

    def classes(self, leaves: Mapping[str, Any]) -> int | None:
        """How many classes the source's classifier has, None where it has none."""
        return self._length(self.key_map.is_classifier, -1, leaves)

    def channels(self, leaves: Mapping[str, Any]) -> int | None:
        """How many channels the source's input convolution takes, None where there is none."""
        return self._length(self.key_map.is_input_conv, -2, leaves)

    def _length(self, chosen: Callable[[str], bool], axis: int, leaves: Mapping[str, Any]) -> int | None:
        # A vote among those that fit on all other axes: one damaged tensor must not reshape the model.
        votes: Counter[int] = Counter()
        for path, entry in {entry.path: entry for entry in self.entries.values()}.items():
            if not chosen(path) or not all(name in self.arrays for name in entry.sources):
                continue
            try:
                shape = entry.rule.transform.target_shape(*(self.arrays[name].shape for name in entry.sources))
            except ValueError:
                continue
            if len(shape) >= -axis and (path not in leaves or _same_but(axis, shape, leaves[path].shape)):
                votes[shape[axis]] += 1
        return votes.most_common(1)[0][0] if votes else None


class Loader:
    """Makes leaves one by one; `check` then raises one error for all that went wrong.

    `dropped` are leaves of the whole model that this one, without its head, leaves out.

    Attributes:
        casts, replaced, adapted, resized, absent: as in `zoo.report.LoadReport`.
    """

    def __init__(self, names: Names, *, replace_classifier: bool, resize: str | None, dropped: Collection[str] = ()):
        self._names, self._key_map = names, names.key_map
        self._replace_classifier, self._method, self._dropped = replace_classifier, resize, dropped
        self._problems: dict[str, list[str]] = {
            kind: [] for kind in ("missing", "unexpected", "misshapen", "mistyped", "not finite")
        }
        self._expected: dict[str, str] = {}
        self.casts: dict[str, str] = {}
        self.replaced: list[str] = []
        self.adapted: dict[str, str] = {}
        self.resized: dict[str, str] = {}
        self.absent: dict[str, float] = {}

    def leaf(self, path: str, leaf: jax.ShapeDtypeStruct) -> Shaped[Array, "..."] | None:
        """The leaf's value, or None where it is replaced or a problem was noted.

        Args:
            path: of the leaf.
            leaf: its shape and dtype in the model.

        Raises:
            KeyMapError: if the key map has no place for the leaf.
        """
        if self._replace_classifier and self._key_map.is_classifier(path):
            self.replaced.append(path)
            return None
        entry = self._key_map.rule_of_target(path)
        if entry is None:
            fill = self._key_map.fill_of(path)
            if fill is None:
                raise KeyMapError(f"no rule of the key map writes leaf {path!r}")
            self.absent[path] = fill
            return jnp.full(leaf.shape, fill, leaf.dtype)
        wanted = dict(zip(entry.sources, entry.rule.transform.source_shapes(leaf.shape), strict=True))
        self._expected |= dict.fromkeys(wanted, path)
        missing = [name for name in wanted if name not in self._names.arrays]
        for name in missing:
            hint = "; num_classes= makes a fresh one" if self._key_map.is_classifier(path) else ""
            self._note("missing", name, f"{wanted[name]}, for {path}{hint}")
        if missing:
            return None
        arrays = {name: self._names.arrays[name] for name in wanted}
        sound = [self._is_sound(name, array, leaf.dtype) for name, array in arrays.items()]
        array = self._fitted(entry, arrays, wanted, leaf)
        if array is None or not all(sound):
            return None
        stored = sorted({array.dtype.name for array in arrays.values()})
        if stored != [leaf.dtype.name]:
            self.casts[path] = f"{' and '.join(stored)} -> {leaf.dtype.name}"
        with np.errstate(over="ignore"):
            # A copy of its own in the order of the leaf: the source may be a file that changes later.
            value = np.array(array, leaf.dtype, order="C", copy=True)
        floating = jnp.issubdtype(leaf.dtype, jnp.floating)
        if path in self.casts and not (np.isfinite(value).all() if floating else np.array_equal(value, array)):
            self._note("not finite", entry.sources[0], f"too large for {leaf.dtype}")
            return None
        return jnp.asarray(value)

    def check(self, what: str) -> dict[str, tuple[str, ...]]:
        """Raises for all problems, unused tensors included; else says what was ignored and why.

        Args:
            what: the beginning of the error's message.

        Raises:
            WeightsError: with everything that is missing, unexpected, misshapen, mistyped or not finite.
        """
        ignored = {reason: list(keys) for reason, keys in self._names.ignored.items()}
        missing = [name for name in self._expected if name not in self._names.arrays]
        for name, array in self._names.arrays.items():
            if name in self._expected:
                continue
            entry = self._names.entries.get(name)
            if entry is not None and entry.path in self._dropped:
                ignored.setdefault("features_only drops the head", []).append(self._names.full(name))
                continue
            if entry is not None and self._key_map.is_classifier(entry.path):
                reason = "the classifier is replaced" if self._replace_classifier else "num_classes=0 drops them"
                ignored.setdefault(reason, []).append(self._names.full(name))
                continue
            hint = ""
            if len(self._problems["unexpected"]) < _HINTED:
                hint = _nearest(name, missing, "missing") or _nearest(name, self._expected, "expected")
            self._note("unexpected", name, f"{array.shape}{hint}")
        if any(self._problems.values()):
            raise WeightsError(what, self._problems)
        return {reason: tuple(keys) for reason, keys in ignored.items()}

    def _note(self, kind: str, name: str, text: str) -> None:
        self._problems[kind].append(f"{self._names.full(name)!r} {text}")

    def _is_sound(self, name: str, array: np.ndarray, dtype: np.dtype) -> bool:
        floating = jnp.issubdtype(dtype, jnp.floating)
        kinds = (jnp.floating, jnp.integer, jnp.bool_)
        if any(jnp.issubdtype(array.dtype, kind) != jnp.issubdtype(dtype, kind) for kind in kinds):
            self._note("mistyped", name, f"is {array.dtype}, {'a floating dtype' if floating else dtype} is wanted")
            return False
        if not floating or np.isfinite(array).all():
            return True
        bad = ~np.isfinite(array)
        first = [int(i) for i in np.unravel_index(bad.argmax(), bad.shape)]
        self._note("not finite", name, f"holds {bad.sum()} NaN or infinite values, the first at {first}")
        return False

    def _fitted(
        self, entry: Entry, arrays: Mapping[str, np.ndarray], wanted: Mapping[str, Any], leaf: jax.ShapeDtypeStruct
    ) -> np.ndarray | None:
        """The leaf in the model's shape and the source's dtype, None where it does not fit."""
        transform, path = entry.rule.transform, entry.path
        if all(array.shape == wanted[name] for name, array in arrays.items()):
            return transform.apply(*arrays.values())
        why = ""
        try:
            shape = transform.target_shape(*(array.shape for array in arrays.values()))
            if self._key_map.is_input_conv(path) and _same_but(-2, shape, leaf.shape):
                self.adapted[path] = f"{shape[-2]} -> {leaf.shape[-2]} channels"
                return _adapt_channels(transform.apply(*arrays.values()), leaf.shape[-2])
            if entry.rule.resize is not None:
                method = self._method or entry.rule.resize_method
                array = entry.rule.resize(transform.apply(*arrays.values()), leaf.shape, method)
                self.resized[path] = f"{shape} -> {leaf.shape}, {method}"
                return array
        except ValueError as error:
            why = f" ({error})"
        for name, array in arrays.items():
            if array.shape != wanted[name]:
                turned = ": looks transposed" if array.shape == wanted[name][::-1] else why
                self._note("misshapen", name, f"is {array.shape}, {wanted[name]} is wanted{turned}")
        return None


def _same_but(axis: int, shape: tuple[int, ...], other: tuple[int, ...]) -> bool:
    return len(shape) == len(other) and all(
        a == b for i, (a, b) in enumerate(zip(shape, other)) if i != axis % len(shape)
    )


def _adapt_channels(kernel: np.ndarray, channels: int) -> np.ndarray:
    """A kernel (h, w, 3, out) for another number of input channels.

    Source: timm, `adapt_input_conv`: one channel gets the sum, more repeat the three, scaled so that equal
    inputs give what they gave before.
    """
    if kernel.shape[-2] != 3:
        raise ValueError(f"in_chans={channels}: only kernels of three channels can be adapted")
    if channels == 1:
        return kernel.astype(np.float32).sum(axis=-2, keepdims=True)
    repeated = np.concatenate([kernel.astype(np.float32)] * math.ceil(channels / 3), axis=-2)
    return repeated[..., :channels, :] * np.float32(3 / channels)


def _nearest(name: str, names: Any, kind: str) -> str:
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"; nearest {kind} name: {close[0]!r}" if close else ""
