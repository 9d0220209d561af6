"""The Routing Transformer against a transcription of its official code, and that code's names of variables.

TensorFlow 1 is not at hand: the transcription is written from the source, loop by loop, in float64.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from tests.reference.weights import pseudo_normal
from zoo.errors import WeightsError
from zoo.formats.readers import read_weights
from zoo.keymap import flatten, unflatten
from zoo.pretrained import abstract_variables
from zoo.routing_transformer.attention import LocalHeads
from zoo.routing_transformer.heads import Heads
from zoo.routing_transformer.image import RoutingImageTransformer
from zoo.routing_transformer.seq2seq import RoutingSeq2Seq
from zoo.routing_transformer.text import RoutingTransformer
from zoo.routing_transformer.weights import official_fields

# Odd heads, windows that overlap, a block that the row is no multiple of, distances beyond the reach.
TINY = dict(
    vocab_size=19,
    length=14,
    embedding_width=6,
    width=10,
    depth=2,
    skip_first=1,
    hidden=12,
    local_heads=1,
    routing_heads=1,
    block=4,
    clusters=3,
    window=5,
    max_relative=3,
    membership="sequence",
)


def made_up(model) -> dict[str, np.ndarray]:
    """Variables by path, none of them at a value where leaving it out would go unnoticed."""
    leaves = flatten(abstract_variables(model))
    return {path: pseudo_normal(path, x.shape) / np.sqrt(max(x.shape[:-1] or (2,))) for path, x in leaves.items()}


def layer_norm(x, scale=1.0, bias=0.0):
    mean = x.mean(-1, keepdims=True)
    return (x - mean) / np.sqrt(np.square(x - mean).mean(-1, keepdims=True) + 1e-6) * scale + bias


def softmax(logits):
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def shaw(query, key, value, distance, keys, values):
    """`dot_product_attention_relative` of one head; `distance` of later keys is None."""
    reach = len(keys) // 2
    out = np.zeros_like(value[: len(query)])
    for i, q in enumerate(query):
        seen = [j for j in range(len(key)) if distance(i, j) is not None]
        rows = np.clip([distance(i, j) for j in seen], -reach, reach) + reach
        weights = softmax((key[seen] + keys[rows]) @ q)
        out[i] = weights @ (value[seen] + values[rows])
    return out


def routing_head(q, v, means, window, keys, values):
    tokens = layer_norm(q)
    total, count = np.zeros_like(v), np.zeros((len(v), 1))
    for mean in means:
        members = np.sort(np.argsort(-(tokens @ mean), kind="stable")[:window])
        own = tokens[members]
        total[members] += shaw(own, own, v[members], lambda i, j: j - i if j <= i else None, keys, values)
        count[members] += 1
    return total / (count + 1e-2)


def local_head(q, k, v, block, keys, values):
    def distance(i, j):
        return j - i if (i // block - 1) * block <= j <= i else None

    return shaw(q, k, v, distance, keys, values)


def transcription(leaves, tokens, fields):
    """Logits of one row."""

    def dense(x, name, bias=True):
        y = x @ leaves[f"params/{name}/kernel"]
        return y + leaves[f"params/{name}/bias"] if bias else y

    x = dense(leaves["params/embedding/embedding"][tokens], "widen")
    for layer in range(fields["depth"]):
        scope = f"blocks_{layer}/"
        attention = scope + "attention/"
        dim = fields["width"] // 2
        q, k, v = (dense(x, attention + n, bias=False).reshape(len(x), 2, dim) for n in "qkv")
        q = q * dim**-0.5
        local = [leaves[f"params/{attention}local/relative/{n}"] for n in ("key", "value")]
        heads = [local_head(q[:, h], k[:, h], v[:, h], fields["block"], *local) for h in range(2)]
        if layer >= fields["skip_first"]:
            tables = [leaves[f"params/{attention}routing/relative/{n}"] for n in ("key", "value")]
            means = leaves[f"centroids/{attention}routing/means"][0]
            heads[0] = routing_head(q[:, 0], v[:, 0], means, fields["window"], *tables)
        out = dense(np.stack(heads, 1), attention + "head_map", bias=False).reshape(len(x), -1)
        out = dense(out, attention + "out", bias=False)
        x = layer_norm(x + out, *(leaves[f"params/{scope}norm1/{n}"] for n in ("scale", "bias")))
        h = dense(x, scope + "feed/fc1", bias=False)
        h = h * 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
        h = dense(h * dense(x, scope + "feed/gate", bias=False), scope + "feed/fc2", bias=False)
        x = layer_norm(x + h, *(leaves[f"params/{scope}norm2/{n}"] for n in ("scale", "bias")))
    return dense(dense(x, "narrow"), "head")


def test_a_small_model_equals_the_transcription():
    with jax.enable_x64(True):
        model = RoutingTransformer(param_dtype=jnp.float64, **TINY)
        leaves = made_up(model)
        tokens = np.random.default_rng(0).integers(0, TINY["vocab_size"], (2, TINY["length"]))
        logits = jax.jit(model.apply)(unflatten(jax.tree.map(jnp.asarray, leaves)), jnp.asarray(tokens))
    for row, actual in zip(tokens, logits, strict=True):
        np.testing.assert_allclose(actual, transcription(leaves, row, TINY), rtol=0, atol=1e-10)


def test_an_encoder_s_local_heads_take_their_queries_to_stand_at_the_end_of_the_keys():
    block, n, dim, reach = 3, 9, 5, 4
    heads = Heads(0, 0, 0, 1, dim, causal=False, block=block, local_relative=True, max_relative=reach)
    with jax.enable_x64(True):
        module = LocalHeads(heads, param_dtype=jnp.float64)
        q, k, v = (pseudo_normal(name, (1, n, 1, dim)) for name in "qkv")
        tables = {name: pseudo_normal(name, (2 * reach + 1, dim)) for name in ("key", "value")}
        variables = {"params": {"relative": jax.tree.map(jnp.asarray, tables)}}
        actual = jax.jit(lambda *qkv: module.apply(variables, *qkv, False))(q, k, v)[0, :, 0]
    for start in range(0, n, block):
        # Keys of three blocks, of which those outside of the row are masked.
        positions = np.arange(start - block, start + 2 * block)

        def distance(i, j, positions=positions):
            return j - (2 * block + i) if 0 <= positions[j] < n else None

        inside = np.clip(positions, 0, n - 1)
        own = (q[0, start : start + block, 0], k[0, inside, 0], v[0, inside, 0])
        expected = shaw(*own, distance, tables["key"], tables["value"])
        np.testing.assert_allclose(actual[start : start + block], expected, rtol=0, atol=1e-12)


def layer_names(stack: str, layer: int, heads: str, *, routed: str | None, feed: tuple[str, ...], cross: bool = False):
    """The variables of a layer as the official code's scopes name them."""
    scope = f"{stack}_layer_{layer}/self_attention/"
    for name in ("self_attention", *(("enc_dec_attention",) if cross else ())):
        yield from (f"{scope}{name}/{part}/kernel" for part in ("q", "k", "v", "output_transform"))
        nd = f"{scope}{name}/attention_nd/"
        yield nd + "dense/kernel"
        relative = heads == "relative" and name == "self_attention"
        tables = [f"relative_positions_{part}s/embeddings" for part in ("key", "value")] if relative else []
        yield from (f"{nd}local_nd/{table}" for table in tables)
        if routed:
            centroids = ("projection_tensors",) if routed == "hash" else ("means", "ema_count", "ema_means")
            yield from (f"{nd}cluster_attention/cluster_attention/{part}" for part in (*centroids, *tables))
    for norm in ("", "_1", "_2") if cross else ("", "_1"):
        yield from (f"{scope}layer_postprocess{norm}/layer_norm/layer_norm_{part}" for part in ("scale", "bias"))
    yield from (f"{scope}ffn/{name}" for name in feed)


GEGLU = tuple(f"weight{i}/kernel" for i in (1, 2, 3))
RELU = tuple(f"conv{i}/{part}" for i in (1, 2) for part in ("kernel", "bias"))
ENDS = ("emb_dense/kernel", "emb_dense/bias", "final_dense_2/kernel", "final_dense_2/bias")
TEXT_ENDS = ("embeddings/embedding", *ENDS)


def text_names(routed: str):
    body = "sparse_transformer/body/"
    yield from (body + name for name in (*TEXT_ENDS, "final_dense_1/kernel", "final_dense_1/bias"))
    for layer in range(2):
        kind = routed if layer >= TINY["skip_first"] else None
        yield from (body + name for name in layer_names("decoder", layer, "relative", routed=kind, feed=GEGLU))


def image_names():
    body = "sparse_imagetransformer/body/"
    yield from (body + n for n in ("rgb_target_emb_channel", "pos_emb_0", "pos_emb_1"))
    yield from (body + n for n in ("final_dense/kernel", "final_dense/bias"))
    yield from (body + name for name in layer_names("decoder", 0, "plain", routed="means", feed=RELU))


def seq2seq_names():
    yield "sparse_transformer/symbol_modality_19_10/shared/weights_0"
    body = "sparse_transformer/body/"
    yield from (body + name for name in TEXT_ENDS)
    yield from (body + n for n in layer_names("encoder", 0, "relative", routed="means", feed=GEGLU))
    yield from (body + n for n in layer_names("decoder", 0, "relative", routed="means", feed=GEGLU, cross=True))


SMALL_IMAGE = dict(
    image_size=(4, 3), channels=3, length=36, width=8, hidden=6, depth=1, block=4, clusters=2, window=3, vocab_size=5
)
HEADS = dict(routing_heads=1, local_heads=1)
SEQ2SEQ = {**TINY, "skip_first": 0, "depth": 1, "embedding_width": None}
CHECKPOINTS = {
    "text": ("routing_transformer_nano", TINY, lambda: text_names("means"), RoutingTransformer),
    "hash": (
        "routing_transformer_nano",
        dict(TINY, hashed=True, clusters=4),
        lambda: text_names("hash"),
        RoutingTransformer,
    ),
    "image": (
        "routing_transformer_image_nano",
        dict(SMALL_IMAGE, **HEADS),
        image_names,
        RoutingImageTransformer,
    ),
    "seq2seq": (
        "routing_transformer_seq2seq_nano",
        dict(SEQ2SEQ, source_vocab_size=19, encoder_depth=1),
        seq2seq_names,
        RoutingSeq2Seq,
    ),
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_official_checkpoints_are_read_and_written(case, tmp_path):
    name, fields, names, module = CHECKPOINTS[case]
    model = zoo.create_model(name, **fields)
    leaves = {path: x.astype(np.float32) for path, x in made_up(model).items()}
    path = tmp_path / "weights.npz"
    zoo.save_pretrained(model, unflatten(leaves), path)
    checkpoint = read_weights(path)
    assert sorted(checkpoint) == sorted(names())

    some = next(iter(checkpoint))
    beside = {"global_step": np.asarray(7), f"{some}/Adafactor": np.zeros(3), f"{some}/Adafactor_1": np.zeros(2)}
    loaded, variables, report = zoo.load_pretrained(name, {**checkpoint, **beside}, **fields)
    assert type(loaded) is module and report.naming == "official"
    assert {key for keys in report.ignored.values() for key in keys} == beside.keys()
    assert "the optimizer's statistics" in report.ignored
    for leaf, value in flatten(variables).items():
        np.testing.assert_array_equal(value, leaves[leaf], err_msg=leaf)


def test_an_image_s_tables_are_the_official_ones():
    name, fields, _, _ = CHECKPOINTS["image"]
    model = zoo.create_model(name, **fields)
    arrays = {"rgb_target_emb_channel": (15, 8), "pos_emb_0": (1, 4, 1, 24), "pos_emb_1": (1, 1, 4, 24)}
    key_map = zoo.registry.family_of(name).key_maps["official"](model)
    for source, shape in arrays.items():
        entry = key_map.rule_of_source(source)
        value = pseudo_normal(source, shape)
        leaf = entry.rule.transform.apply(value)
        assert leaf.shape == flatten(abstract_variables(model))[entry.path].shape
        np.testing.assert_array_equal(leaf.reshape(-1), value.reshape(-1))


def test_a_checkpoint_tells_the_fields_of_its_model(tmp_path):
    for case in ("text", "hash"):
        name, fields, _, _ = CHECKPOINTS[case]
        path = tmp_path / f"{case}.npz"
        zoo.save_pretrained(zoo.create_model(name, **fields), unflatten(made_up_32(name, fields)), path)
        told = official_fields(path)
        assert told.items() <= dict(fields, hashed=case == "hash", **RELATIVE, cluster_strided_heads=0).items()
        assert set(fields) - set(told) == {"length", "block", "window", "membership"}

        hparams = tmp_path / "hparams.json"
        rest = {"max_length": 14, "query_shape": [4], "memory_flange": [4], "sparsity_cluster_attention_window": 5}
        hparams.write_text(json.dumps({**rest, "share_qk": True, "dropout": 0.25, "hidden_size": 10}))
        told = official_fields(path, hparams)
        assert {field: told[field] for field in ("length", "block", "look", "window", "embedding_dropout")} == dict(
            length=14, block=4, look=1, window=5, embedding_dropout=0.25
        )
        model, _, _ = zoo.load_pretrained("routing_transformer_pg19", path, **told)
        assert (model.width, model.skip_first, model.routing_heads) == (10, 1, 1)


RELATIVE = dict(local_relative=True, routing_relative=True)


def made_up_32(name, fields):
    return {path: x.astype(np.float32) for path, x in made_up(zoo.create_model(name, **fields)).items()}


def test_a_checkpoint_that_no_fields_describe_is_refused(tmp_path):
    name, fields, _, _ = CHECKPOINTS["text"]
    path = tmp_path / "weights.npz"
    zoo.save_pretrained(zoo.create_model(name, **fields), unflatten(made_up_32(name, fields)), path)
    arrays = read_weights(path)
    with pytest.raises(WeightsError, match="no variable 'sparse_transformer/body/emb_dense/kernel'"):
        official_fields({key: x for key, x in arrays.items() if "emb_dense" not in key})
    swapped = {key.replace("layer_1", "layer_x").replace("layer_0", "layer_1"): x for key, x in arrays.items()}
    swapped = {key.replace("layer_x", "layer_0"): x for key, x in swapped.items()}
    with pytest.raises(WeightsError, match="these routing and cluster-strided heads: 1 and 0, 0 and 0"):
        official_fields(swapped)
