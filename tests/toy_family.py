"""A small family for the tests of loading: every kind of leaf, three namings, and its weights in two of them."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo import registry
from zoo.image_model import ImageModel
from zoo.keymap import KeyMap, Rule, flatten, torch_batch_norm, torch_conv, torch_layer_norm, torch_linear
from zoo.registry import Family, PretrainedCfg
from zoo.transforms import Axes, head_interleaved

DIM, HEADS = 8, 2


class Toy(ImageModel):
    num_classes: int = 10
    image_size: int = 12
    depth: int = 2
    counts: bool = False

    @nn.compact
    def __call__(self, images, train: bool = False):
        like = dict(param_dtype=self.param_dtype)
        x = nn.Conv(DIM, (3, 3), strides=4, name="stem", **like)(images)
        if self.counts:
            self.variable("routing", "count", jnp.zeros, (2,), jnp.int32)
        x = nn.BatchNorm(use_running_average=not train, name="norm", **like)(x)
        span = 2 * (self.image_size // 4) - 1
        for i in range(self.depth):
            qkv = nn.Dense(3 * DIM, name=f"blocks_{i}_qkv", **like)(x)
            table = self.param(f"blocks_{i}_table", nn.initializers.normal(), (HEADS, span, span), self.param_dtype)
            x = x + qkv[..., :DIM] * table.mean()
        x = nn.LayerNorm(name="head_norm", **like)(x.mean(axis=(1, 2)))
        return nn.Dense(self.num_classes, name="head", **like)(x) if self.num_classes else x


def resize_table(array: np.ndarray, shape: tuple[int, ...], method: str) -> np.ndarray:
    if len(array.shape) != 3 or array.shape[0] != shape[0]:
        raise ValueError("only the two sides of a table can be resized")
    return np.asarray(jax.image.resize(array.astype(np.float32), shape, method))


SPECIAL = dict(
    classifier=("params/head/kernel", "params/head/bias"),
    input_conv=("params/stem/kernel",),
)


def torch_names(model: Toy) -> KeyMap:
    return KeyMap(
        (
            *torch_conv("stem.conv", "stem"),
            *torch_batch_norm("stem.bn", "norm"),
            Rule("count", "routing/count"),
            Rule("blocks.{i}.qkv.weight", "params/blocks_{i}_qkv/kernel", head_interleaved(HEADS)),
            Rule("blocks.{i}.qkv.bias", "params/blocks_{i}_qkv/bias", head_interleaved(HEADS, bias=True)),
            Rule("blocks.{i}.table", "params/blocks_{i}_table", resize=resize_table),
            *torch_layer_norm("head.norm", "head_norm"),
            *torch_linear("head.fc", "head"),
        ),
        ignore={"*.num_batches_tracked": "a counter of training steps", "*.index": "a constant table"},
        **SPECIAL,
    )


def tensorflow_names(model: Toy) -> KeyMap:
    stack = dict(t=3, h=HEADS)
    return KeyMap(
        (
            Rule("conv/kernel", "params/stem/kernel"),
            Rule("conv/bias", "params/stem/bias"),
            Rule("bn/gamma", "params/norm/scale"),
            Rule("bn/beta", "params/norm/bias"),
            Rule("bn/moving_mean", "batch_stats/norm/mean"),
            Rule("bn/moving_variance", "batch_stats/norm/var"),
            Rule(
                tuple(f"block_{{i:02}}/{x}/weight" for x in "qkv"),
                "params/blocks_{i}_qkv/kernel",
                Axes("t | c h d -> c (t h d)", **stack),
            ),
            Rule(
                tuple(f"block_{{i:02}}/{x}/bias" for x in "qkv"),
                "params/blocks_{i}_qkv/bias",
                Axes("t | h d -> (t h d)", **stack),
            ),
            Rule("block_{i:02}/relative_bias", "params/blocks_{i}_table", resize=resize_table),
            Rule("ln/gamma", "params/head_norm/scale"),
            Rule("ln/beta", "params/head_norm/bias"),
            Rule("logits/kernel", "params/head/kernel"),
            Rule("logits/bias", "params/head/bias"),
        ),
        prefix="toy/",
        ema_suffix="/ExponentialMovingAverage",
        **SPECIAL,
    )


def tower_names(model: Toy) -> KeyMap:
    """A naming without classifier and head norm."""
    whole = torch_names(model)
    rules = tuple(rule for rule in whole.rules if "head" not in rule.target)
    absent = {"params/head_norm/scale": 1.0, "params/head_norm/bias": 0.0}
    return KeyMap(rules, absent_in_source=absent, ignore=whole.ignore, prefix="tower.", **SPECIAL)


def cfg(tag: str, **fields: Any) -> PretrainedCfg:
    default = dict(image_size=12, num_classes=10, naming="torch", license="none", source="here", hub_id="toys/toy")
    return PretrainedCfg(tag=tag, **{**default, **fields})


FAMILY = Family(
    name="toy",
    module=Toy,
    variants={"toy_tiny": {}, "toy_deep": dict(depth=4)},
    pretrained={
        c.tag: c
        for c in (
            cfg("toy_tiny.hub", filenames=("missing.safetensors", "model.safetensors")),
            cfg("toy_tiny.known", sha256="0" * 64),
            cfg("toy_tiny.lost", availability="link dead"),
        )
    },
    key_maps={"torch": torch_names, "tensorflow": tensorflow_names, "tower": tower_names},
    layers=lambda model: (lambda path: 0, 0),
    sharding_rules=(),
)


@pytest.fixture
def toy(monkeypatch):
    """The toy family, for the tests that use this alone."""
    monkeypatch.setattr(registry, "_FAMILIES", dict(registry._FAMILIES))
    monkeypatch.setattr(registry, "_FAMILY_OF", dict(registry._FAMILY_OF))
    registry.register(FAMILY)


def torch_arrays(classes=10, chans=3, depth=2, span=5, dtype=np.float32):
    """A checkpoint in the toy's torch names."""
    shapes = {"stem.conv.weight": (DIM, chans, 3, 3), "stem.conv.bias": (DIM,)}
    shapes |= {f"stem.bn.{n}": (DIM,) for n in ("weight", "bias", "running_mean", "running_var")}
    for i in range(depth):
        shapes |= {f"blocks.{i}.qkv.weight": (3 * DIM, DIM), f"blocks.{i}.qkv.bias": (3 * DIM,)}
        shapes |= {f"blocks.{i}.table": (HEADS, span, span)}
    shapes |= {"head.norm.weight": (DIM,), "head.norm.bias": (DIM,)}
    shapes |= {"head.fc.weight": (classes, DIM), "head.fc.bias": (classes,)}
    generator = np.random.default_rng(0)
    return {name: generator.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def split_heads(packed):
    """Rows (head, [q k v], channel) as q, k and v of (heads, channels, ...)."""
    width = DIM // HEADS
    rows = packed.reshape(HEADS, 3, width, *packed.shape[1:])
    return rows[:, 0], rows[:, 1], rows[:, 2]


def wanted_leaves(arrays, depth=2):
    """What the torch arrays are in the model, without the key map."""
    leaves = {
        "params/stem/kernel": np.einsum("oihw->hwio", arrays["stem.conv.weight"]),
        "params/stem/bias": arrays["stem.conv.bias"],
        "params/norm/scale": arrays["stem.bn.weight"],
        "params/norm/bias": arrays["stem.bn.bias"],
        "batch_stats/norm/mean": arrays["stem.bn.running_mean"],
        "batch_stats/norm/var": arrays["stem.bn.running_var"],
        "params/head_norm/scale": arrays["head.norm.weight"],
        "params/head_norm/bias": arrays["head.norm.bias"],
        "params/head/kernel": arrays["head.fc.weight"].T,
        "params/head/bias": arrays["head.fc.bias"],
    }
    for i in range(depth):
        q, k, v = (x.reshape(DIM, DIM) for x in split_heads(arrays[f"blocks.{i}.qkv.weight"]))
        leaves[f"params/blocks_{i}_qkv/kernel"] = np.concatenate([q, k, v]).T
        q, k, v = (x.reshape(DIM) for x in split_heads(arrays[f"blocks.{i}.qkv.bias"]))
        leaves[f"params/blocks_{i}_qkv/bias"] = np.concatenate([q, k, v])
        leaves[f"params/blocks_{i}_table"] = arrays[f"blocks.{i}.table"]
    return leaves


def tensorflow_arrays(arrays, depth=2):
    """The same weights in the toy's TensorFlow names."""
    leaves = wanted_leaves(arrays, depth)
    found = {
        "toy/conv/kernel": leaves["params/stem/kernel"],
        "toy/conv/bias": leaves["params/stem/bias"],
        "toy/bn/gamma": leaves["params/norm/scale"],
        "toy/bn/beta": leaves["params/norm/bias"],
        "toy/bn/moving_mean": leaves["batch_stats/norm/mean"],
        "toy/bn/moving_variance": leaves["batch_stats/norm/var"],
        "toy/ln/gamma": leaves["params/head_norm/scale"],
        "toy/ln/beta": leaves["params/head_norm/bias"],
        "toy/logits/kernel": leaves["params/head/kernel"],
        "toy/logits/bias": leaves["params/head/bias"],
    }
    for i in range(depth):
        weights, biases = split_heads(arrays[f"blocks.{i}.qkv.weight"]), split_heads(arrays[f"blocks.{i}.qkv.bias"])
        for x, weight, bias in zip("qkv", weights, biases):
            found[f"toy/block_{i:02}/{x}/weight"] = np.einsum("hdc->chd", weight)
            found[f"toy/block_{i:02}/{x}/bias"] = bias
        found[f"toy/block_{i:02}/relative_bias"] = arrays[f"blocks.{i}.table"]
    return found


def assert_leaves(variables, wanted):
    found = flatten(variables)
    assert set(found) == set(wanted)
    for path, array in wanted.items():
        assert found[path].dtype == array.dtype, path
        np.testing.assert_array_equal(np.asarray(found[path]), array, err_msg=path)
