"""Key maps and transforms: one table in both directions, and its own mistakes found."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.keymap import (
    KeyMap,
    KeyMapError,
    Rule,
    check_key_map,
    flatten,
    identity_map,
    torch_batch_norm,
    torch_conv,
    torch_layer_norm,
    torch_linear,
    unflatten,
)
from zoo.transforms import Axes, conv, head_interleaved, identity, linear, pointwise


def both_ways(rule: Rule, sources: tuple[str, ...], target: str):
    """The rule goes from these names to this path and back."""
    key_map = KeyMap((rule,))
    entry = key_map.rule_of_target(target)
    assert entry is not None and entry.sources == sources and entry.path == target
    for source in sources:
        assert key_map.rule_of_source(source) == entry
    return key_map


def test_integers_and_offsets():
    rule = Rule("blocks.{i}.{j}.w", "params/blocks_{i}_{j}/w")
    key_map = both_ways(rule, ("blocks.0.11.w",), "params/blocks_0_11/w")
    for wrong in ("blocks.0.11.w2", "blocks.00.1.w", "blocks.-1.1.w", "xblocks.0.1.w", "blocks.a.1.w", "blocks.0.1xw"):
        assert key_map.rule_of_source(wrong) is None
    shifted = both_ways(Rule("down.{i+1}.w", "params/downs_{i}/w"), ("down.1.w",), "params/downs_0/w")
    assert shifted.rule_of_source("down.0.w") is None
    both_ways(Rule("down.{i}.w", "params/downs_{i-1}/w", where={"i": range(1, 4)}), ("down.3.w",), "params/downs_2/w")
    limited = KeyMap((Rule("s.{i}", "params/{i}", where={"i": range(1, 3)}),))
    assert [limited.rule_of_source(f"s.{i}") is not None for i in range(4)] == [False, True, True, False]
    assert [limited.rule_of_target(f"params/{i}") is not None for i in range(4)] == [False, True, True, False]


def test_leading_zeros_and_repeated_names():
    rule = Rule("block_{i:02}_{j:02}/w", "params/blocks_{i}_{j}/w")
    key_map = both_ways(rule, ("block_03_12/w",), "params/blocks_3_12/w")
    assert key_map.rule_of_source("block_3_12/w") is None
    twice = both_ways(Rule("a.{i}.b.{i}", "params/{i}"), ("a.2.b.2",), "params/2")
    assert twice.rule_of_source("a.2.b.3") is None


def test_spelled_placeholders():
    halves = {"spatial_block": "spatial", "channel_block": 1}
    rule = Rule("b.{j}.{t}.w", "params/b_{j}/{t}/w", where={"t": halves})
    both_ways(rule, ("b.4.spatial_block.w",), "params/b_4/spatial/w")
    both_ways(rule, ("b.4.channel_block.w",), "params/b_4/1/w")
    # TensorFlow leaves the first of several layers of a name without a number.
    layers = Rule("attention{a}/q/w", "params/{a}/q", where={"a": {"": "attn_block", "_1": "attn_grid"}})
    both_ways(layers, ("attention/q/w",), "params/attn_block/q")
    both_ways(layers, ("attention_1/q/w",), "params/attn_grid/q")
    assert KeyMap((layers,)).rule_of_source("attention_2/q/w") is None


def test_several_sources():
    rule = Rule(tuple(f"att{{i}}/{x}/w" for x in "qkv"), "params/{i}/qkv", Axes("t | c h d -> c (t h d)", t=3))
    key_map = both_ways(rule, ("att1/q/w", "att1/k/w", "att1/v/w"), "params/1/qkv")
    assert key_map.coverage(["att0/q/w", "att0/v/w", "att0/o/w"]) == 2


@pytest.mark.parametrize(
    ("make", "message"),
    (
        (lambda: Rule("a.{i}", "b/{j}"), "placeholders of source and target differ"),
        (lambda: Rule(("a.{i}", "b"), "b/{i}"), "placeholders of source and target differ"),
        (lambda: Rule("a.{i}", "b/{i}", where={"t": {"x": 0}}), r"no placeholder for where= \['t'\]"),
        (lambda: Rule("a.{i*2}", "b/{i*2}"), r"placeholders are {i}, {i\+1}"),
        (lambda: Rule("a.{t+1}", "b/{t}", where={"t": {"x": 0}}), "spelled by a table"),
    ),
)
def test_wrong_rules(make, message):
    with pytest.raises(KeyMapError, match=message):
        make()


def test_layouts_against_numpy():
    w = np.arange(2 * 3 * 5 * 7, dtype=np.float32).reshape(2, 3, 5, 7)
    np.testing.assert_array_equal(conv.apply(w), np.transpose(w, (2, 3, 1, 0)))
    np.testing.assert_array_equal(linear.apply(w[0, 0]), w[0, 0].T)
    np.testing.assert_array_equal(pointwise.apply(w[..., :1, :1]), w[..., 0, 0].T)
    np.testing.assert_array_equal(identity.apply(w), w)


def test_head_interleaved_qkv():
    heads, width, channels = 2, 3, 5
    q, k, v = np.random.default_rng(0).normal(size=(3, heads * width, channels)).astype(np.float32)
    per_head = [part[h * width : (h + 1) * width] for h in range(heads) for part in (q, k, v)]
    packed = np.concatenate(per_head)
    np.testing.assert_array_equal(head_interleaved(heads).apply(packed), np.concatenate([q, k, v]).T)
    bias = head_interleaved(heads, bias=True)
    np.testing.assert_array_equal(bias.apply(packed[:, 0]), np.concatenate([q, k, v])[:, 0])


def test_stacked_sources():
    q, k, v = np.random.default_rng(0).normal(size=(3, 4, 2, 3))
    stack = Axes("t | c h d -> c (t h d)", t=3)
    wanted = np.concatenate([x.reshape(4, 6) for x in (q, k, v)], axis=1)
    np.testing.assert_array_equal(stack.apply(q, k, v), wanted)
    assert stack.target_shape(q.shape, k.shape, v.shape) == (4, 18)
    with pytest.raises(ValueError, match="shapes differ"):
        stack.target_shape((4, 2, 3), (4, 2, 3), (4, 2, 4))


def test_swin_table_as_key_minus_query():
    """A flat table indexed by query minus key becomes (head, dy, dx) indexed by key minus query."""
    side, heads = 2, 3
    span = 2 * side - 1
    flat = np.random.default_rng(0).normal(size=(span * span, heads))
    table = Axes("(y x) h -> h y x", y="x", flip=("y", "x"))
    ours = table.apply(flat)
    assert ours.shape == (heads, span, span) == table.target_shape(flat.shape)
    for dy in range(-1, 2):
        for dx in range(-1, 2):
            swin = flat[(-dy + side - 1) * span + (-dx + side - 1)]
            np.testing.assert_array_equal(ours[:, dy + side - 1, dx + side - 1], swin)
    with pytest.raises(ValueError, match="cannot be split into"):
        table.target_shape((8, heads))
    with pytest.raises(ValueError, match="y=3 is not x=4"):
        table.source_shapes((heads, 3, 4))


TRANSFORMS = (
    (identity, (4, 3)),
    (linear, (4, 3)),
    (conv, (4, 3, 2, 5)),
    (pointwise, (4, 3, 1, 1)),
    (head_interleaved(2), (12, 5)),
    (head_interleaved(2, bias=True), (12,)),
    (Axes("h i d -> i (h d)", h=2, d=3), (2, 4, 3)),
    (Axes("(y x) h -> h y x", y="x", flip=("x",)), (9, 2)),
)


@pytest.mark.parametrize(("transform", "shape"), TRANSFORMS, ids=lambda x: str(x))
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_inverse_is_bit_equal(transform, shape, dtype):
    array = np.asarray(jnp.asarray(np.random.default_rng(1).normal(size=shape), dtype))
    leaf = transform.apply(array)
    assert leaf.shape == transform.target_shape(shape)
    assert transform.source_shapes(leaf.shape) == (shape,)
    (back,) = transform.invert(leaf)
    assert back.dtype == array.dtype and back.tobytes() == array.tobytes()


def test_wrong_shapes_and_patterns():
    with pytest.raises(ValueError, match=r"wants 2 axes, not the shape \(1, 2, 3\)"):
        linear.source_shapes((1, 2, 3))
    with pytest.raises(ValueError, match="cannot be split"):
        head_interleaved(2).target_shape((13, 5))
    with pytest.raises(ValueError, match="cannot be split"):
        pointwise.target_shape((4, 3, 3, 3))
    with pytest.raises(ValueError, match="each axis must occur once on each side"):
        Axes("a b -> a")
    with pytest.raises(ValueError, match="how many are stacked must be given as t="):
        Axes("t | a -> (t a)")
    with pytest.raises(ValueError, match="has no axis 'c'"):
        Axes("a b -> b a", c=3)
    with pytest.raises(ValueError, match=r"does not tell \['a', 'b'\]"):
        Axes("(a b) -> a b").target_shape((6,))


def leaves(**shapes):
    return {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes.items()}


VARIABLES = {
    "params": {
        "stem": leaves(kernel=(3, 3, 3, 8), bias=(8,)),
        "norm": leaves(scale=(8,), bias=(8,)),
        "extra": leaves(scale=(8,)),
        "head": leaves(kernel=(8, 10), bias=(10,)),
    },
    "batch_stats": {"norm": leaves(mean=(8,), var=(8,))},
}
RULES = (
    *torch_conv("stem.conv", "stem"),
    *torch_batch_norm("stem.bn", "norm"),
    *torch_linear("fc", "head"),
)
SHAPES = {
    "stem.conv.weight": (8, 3, 3, 3),
    "stem.conv.bias": (8,),
    "stem.bn.weight": (8,),
    "stem.bn.bias": (8,),
    "stem.bn.running_mean": (8,),
    "stem.bn.running_var": (8,),
    "stem.bn.num_batches_tracked": (),
    "fc.weight": (10, 8),
    "fc.bias": (10,),
}
OPTIONS = dict(absent_in_source={"params/extra/scale": 1.0}, ignore={"*.num_batches_tracked": "a counter"})


def test_check_key_map():
    assert check_key_map(KeyMap(RULES, **OPTIONS), VARIABLES, SHAPES) == ()
    spare = torch_layer_norm("none", "none", bias=False)
    assert check_key_map(KeyMap(RULES + spare, **OPTIONS), VARIABLES, SHAPES) == spare
    prefixed = {f"net.{k}": v for k, v in SHAPES.items()} | {"text.w": (3,)}
    assert check_key_map(KeyMap(RULES, prefix="net.", **OPTIONS), VARIABLES, prefixed) == ()


@pytest.mark.parametrize(
    ("change", "shapes", "problems"),
    (
        (dict(absent_in_source={}), SHAPES, ["no rule writes leaf params/extra/scale"]),
        (dict(ignore={}), SHAPES, [r"no rule reads source stem.bn.num_batches_tracked \(\)"]),
        (dict(rules=RULES[:-1]), SHAPES, ["no rule writes leaf params/head/bias", r"reads source fc.bias \(10,\)"]),
        (dict(rules=RULES[-1:] + RULES), SHAPES, ["'params/head/bias' is written by two", "'fc.bias' matches two"]),
        (dict(), SHAPES | {"fc.weight": (8, 10)}, [r"fc.weight \(8, 10\): leaf params/head/kernel wants \(10, 8\)"]),
        (dict(), {k: v for k, v in SHAPES.items() if k != "fc.bias"}, ["fc.bias for leaf params/head/bias is missing"]),
        (
            dict(rules=RULES + torch_layer_norm("old", "old", bias=False)),
            SHAPES | {"old.weight": (8,)},
            [r"source old.weight \(8,\) is for leaf params/old/scale, which does not exist"],
        ),
        (
            dict(absent_in_source={"params/extra/scale": 1.0, "params/head/bias": 0.0}),
            SHAPES,
            ["params/head/bias has a rule and is declared absent"],
        ),
        (
            dict(ignore={"*.num_batches_tracked": "a counter", "fc.*": "unused"}),
            SHAPES,
            ["'fc.bias' is ignored and read for 'params/head/bias' as well"],
        ),
        (
            dict(rules=(*RULES[:-1], Rule("fc.weight", "params/head/bias"))),
            SHAPES,
            ["'fc.weight' matches two rules"],
        ),
    ),
)
def test_check_key_map_finds(change, shapes, problems):
    key_map = KeyMap(**(dict(rules=RULES, **OPTIONS) | change))
    with pytest.raises(KeyMapError) as error:
        check_key_map(key_map, VARIABLES, shapes)
    for problem in problems:
        assert error.match(problem)


def test_classifier_and_input_conv():
    key_map = KeyMap(RULES, classifier=("params/head/kernel", "params/head/bias"), input_conv=("params/stem/kernel",))
    assert key_map.has_classifier
    assert not KeyMap(RULES[:-2], classifier=key_map.classifier).has_classifier
    assert key_map.is_classifier("params/head/bias") and not key_map.is_classifier("params/stem/bias")
    assert key_map.is_input_conv("params/stem/kernel") and not key_map.is_input_conv("params/stem/bias")
    own = identity_map(flatten(VARIABLES), key_map)
    assert check_key_map(own, VARIABLES, {path: leaf.shape for path, leaf in flatten(VARIABLES).items()}) == ()
    assert own.classifier == key_map.classifier


def test_flatten():
    assert unflatten(flatten(VARIABLES)) == VARIABLES
    assert flatten({"a": {"b": 1, "c": {}}, "d": 2}) == {"a/b": 1, "d": 2}
