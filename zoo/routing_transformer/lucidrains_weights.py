"""What github.com/lucidrains/routing-transformer calls the parameters and buffers of its language model."""

from dataclasses import dataclass

import flax.linen as nn
import numpy as np

from zoo.keymap import KeyMap, Rule, torch_layer_norm, torch_linear
from zoo.transforms import Array, Shape, Transform


@dataclass(frozen=True, eq=False)
class Beside(Transform):
    """A tensor with companions that tell nothing: constants, and tensors without entries.

    They must have the shapes that they have in such a model, and are written with it, so that the module which made
    the checkpoint reads it back.

    Attributes:
        transform: of the tensor.
        companions: the values to write.
    """

    transform: Transform
    companions: tuple[Array, ...]

    def apply(self, *arrays: Array) -> Array:
        return self.transform.apply(arrays[0])

    def invert(self, array: Array) -> tuple[Array, ...]:
        return (*self.transform.invert(array), *self.companions)

    def target_shape(self, *shapes: Shape) -> Shape:
        for shape, companion in zip(shapes[1:], self.companions, strict=True):
            if shape != companion.shape:
                raise ValueError(f"beside it stands {shape}, where this model has {companion.shape}")
        return self.transform.target_shape(shapes[0])

    def source_shapes(self, shape: Shape) -> tuple[Shape, ...]:
        return (*self.transform.source_shapes(shape), *(companion.shape for companion in self.companions))


class Twice(Transform):
    """A tensor that is saved under two names."""

    def apply(self, *arrays: Array) -> Array:
        first, second = arrays
        if not np.array_equal(first, second):
            raise ValueError("the two names of a shared tensor hold different values")
        return first

    def invert(self, array: Array) -> tuple[Array, ...]:
        return array, array

    def target_shape(self, *shapes: Shape) -> Shape:
        if len(set(shapes)) != 1:
            raise ValueError(f"shapes differ: {', '.join(map(str, shapes))}")
        return shapes[0]

    def source_shapes(self, shape: Shape) -> tuple[Shape, ...]:
        return shape, shape


def _beside(rule: Rule, companions: dict[str, np.ndarray]) -> Rule:
    """The rule of a tensor with companions by their names."""
    transform = Beside(rule.transform, tuple(companions.values()))
    return Rule((rule.source, *companions), rule.target, transform) if companions else rule


def _residual(model: nn.Module, source: str, target: str) -> tuple[Rule, ...]:
    if model.norm == "layer":
        return torch_layer_norm(f"{source}.norm", f"{target}/norm")
    name = "norm.g" if model.norm == "scale" else "residual_weight"
    return (Rule(f"{source}.{name}", f"params/{target}/factor"),)


def _attention(model: nn.Module, layer: int, source: str) -> list[Rule]:
    target, local = f"blocks_{layer}/attention", model.locals_of(layer)
    names = "qv" if model.shared else "qkv"
    (out,) = torch_linear(f"{source}.to_out", f"{target}/out", bias=False)
    rules = []
    if local:
        kernel, bias = torch_linear(f"{source}.local_to_qkv", f"{target}/local_qkv")
        name = f"{source}.local_attn.rel_pos.inv_freq"
        rules += [_beside(kernel, {name: _frequencies(model)} if model.rotary else {}), bias]
    if local == model.num_heads:
        none = np.zeros((0, model.width), np.float32)
        return [*rules, _beside(out, {f"{source}.to_{name}.weight": none for name in names})]
    for name in names:
        rules += torch_linear(f"{source}.to_{name}", f"{target}/{name}", bias=False)
    heads, state, source = f"{target}/routing", f"centroids/{target}/routing", f"{source}.global_attn"
    none = np.zeros((model.num_heads - local, model.length // model.window, 0, model.head_dim), np.float32)
    memories = {f"{source}.mem_{name}": f"params/{heads}/memory_{name}" for name in ("key", "value")}
    means = Rule(f"{source}.kmeans.means", f"{state}/means")
    if model.memory_slots:
        rules += [means, *(Rule(name, leaf) for name, leaf in memories.items())]
    else:
        rules.append(_beside(means, dict.fromkeys(memories, none)))
    return [*rules, out, Rule(f"{source}.kmeans.initted", f"{state}/initted")]


def _frequencies(model: nn.Module) -> np.ndarray:
    steps = np.arange(0, model.head_dim, 2, dtype=np.float32) / np.float32(model.head_dim)
    return (1.0 / np.float32(10000.0) ** steps).astype(np.float32)


def _lucidrains(model: nn.Module) -> KeyMap:
    """Names of `RoutingTransformerLM`."""
    narrow = model.embedding_width not in (None, model.width)
    stack = "routing_transformer.fn" if narrow else "routing_transformer"
    angles = np.arange(model.length, dtype=np.float32)[:, None] * _frequencies(model)
    positions = {"sinu_pos_emb.emb": np.concatenate([np.sin(angles), np.cos(angles)], axis=1)}
    norm, bias = torch_layer_norm("norm", "final_norm")
    rules = [_beside(norm, positions), bias]
    if model.tie_embeddings:
        rules.append(Rule(("token_emb.weight", "out.tensor"), "params/embedding/embedding", Twice()))
    else:
        rules += [Rule("token_emb.weight", "params/embedding/embedding"), *torch_linear("out", "head")]
    if narrow:
        rules += torch_linear("routing_transformer.project_in", "widen")
        rules += torch_linear("routing_transformer.project_out", "narrow")
    for layer in range(model.depth):
        parts = [f"layers.{layer}.0", f"layers.{layer}.1"]
        if model.reversible:
            parts = [f"blocks.{layer}.f.net", f"blocks.{layer}.g.net"]
        first, second = (f"{stack}.layers.{part}" for part in parts)
        rules += _residual(model, first, f"blocks_{layer}/residual1")
        rules += _attention(model, layer, f"{first}.fn")
        rules += _residual(model, second, f"blocks_{layer}/residual2")
        for name, leaf in (("w1", "fc1"), ("w2", "fc2")):
            rules += torch_linear(f"{second}.fn.fn.{name}", f"blocks_{layer}/feed/{leaf}")
    return KeyMap(tuple(rules))


LUCIDRAINS_KEY_MAPS = {"lucidrains": _lucidrains}
