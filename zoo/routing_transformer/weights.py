"""Foreign weights of the Routing Transformer: what the official code calls each variable, and what they tell.

A TensorFlow 1 graph names a variable by its scopes. The official code opens the scope of its clusters twice, once for
the heads and once for their centroids and tables.
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn

from zoo.errors import WeightsError
from zoo.formats.readers import Source, open_source
from zoo.keymap import KeyMap, Rule
from zoo.transforms import Axes

# The published PG-19 checkpoint is a zip on a web server, with neither digest nor repository to fetch from.
PRETRAINED: dict[str, Any] = {}

_BODY = "sparse_transformer/body/"

# tensor2tensor's name of a hyperparameter -> the field; those whose values the shapes tell are not among them.
_HPARAMS = {
    "max_length": "length",
    "sparsity_cluster_attention_window": "window",
    "sparsity_strided_num_heads": "strided_heads",
    "share_qk": "share_qk",
    "decay": "decay",
    "beta": "commitment",
    "layer_prepostprocess_dropout": "dropout",
    "attention_dropout": "attention_dropout",
    "relu_dropout": "hidden_dropout",
    "dropout": "embedding_dropout",
    "target_dropout": "target_dropout",
    "add_timing_signal": "timing_signal",
}

_SLOTS = {
    "*/Adafactor*": "the optimizer's statistics",
    "*/Adam*": "the optimizer's statistics",
    "global_step": "a counter of training steps",
    "losses_avg/*": "averages of losses, for display",
}


def _dense(source: str, target: str, *, bias: bool = False) -> tuple[Rule, ...]:
    rules = (Rule(f"{source}/kernel", f"params/{target}/kernel"),)
    return (*rules, Rule(f"{source}/bias", f"params/{target}/bias")) if bias else rules


def _norm(source: str, target: str) -> tuple[Rule, ...]:
    scope = f"{source}/layer_norm/layer_norm"
    return (Rule(f"{scope}_scale", f"params/{target}/scale"), Rule(f"{scope}_bias", f"params/{target}/bias"))


def _tables(source: str, target: str) -> tuple[Rule, ...]:
    return tuple(
        Rule(f"{source}/relative_positions_{name}s/embeddings", f"params/{target}/relative/{name}")
        for name in ("key", "value")
    )


def _attention(source: str, target: str) -> tuple[Rule, ...]:
    heads = f"{source}/attention_nd"
    rules = [rule for name in "qkv" for rule in _dense(f"{source}/{name}", f"{target}/{name}")]
    rules += _dense(f"{heads}/dense", f"{target}/head_map") + _dense(f"{source}/output_transform", f"{target}/out")
    rules += _tables(f"{heads}/local_nd", f"{target}/local")
    for scope, name in (("cluster_attention", "routing"), ("cluster_strided_attention", "cluster_strided")):
        scope = f"{heads}/{scope}/{scope}"
        rules += _tables(scope, f"{target}/{name}")
        for variable, leaf in (("means", "means"), ("ema_count", "count"), ("ema_means", "total")):
            rules.append(Rule(f"{scope}/{variable}", f"centroids/{target}/{name}/{leaf}"))
    scope = f"{heads}/cluster_attention/cluster_attention/projection_tensors"
    return (*rules, Rule(scope, f"centroids/{target}/routing/projections"))


def _layers(stack: str, target: str, *, source_attention: bool = False) -> tuple[Rule, ...]:
    """The rules of all layers of a stack, `"encoder"` or `"decoder"`."""
    layer = f"{stack}_layer_{{i}}/self_attention"
    last = 2 if source_attention else 1
    rules = [
        *_attention(f"{layer}/self_attention", f"{target}/attention"),
        *_norm(f"{layer}/layer_postprocess", f"{target}/norm1"),
        *_norm(f"{layer}/layer_postprocess_{last}", f"{target}/norm2"),
    ]
    if source_attention:
        rules += _attention(f"{layer}/enc_dec_attention", f"{target}/source_attention")
        rules += _norm(f"{layer}/layer_postprocess_1", f"{target}/source_norm")
    for name, leaf in (("weight1", "fc1"), ("weight2", "gate"), ("weight3", "fc2")):
        rules += _dense(f"{layer}/ffn/{name}", f"{target}/feed/{leaf}")
    return tuple(rules)


def _relu_layers(rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """The same with a feed-forward of two matrices with biases."""
    layer, target = "decoder_layer_{i}/self_attention/ffn", "blocks_{i}/feed"
    kept = tuple(rule for rule in rules if "/ffn/" not in str(rule.source))
    pairs = (("conv1", "fc1"), ("conv2", "fc2"))
    return kept + tuple(r for a, b in pairs for r in _dense(f"{layer}/{a}", f"{target}/{b}", bias=True))


def _text_rules() -> tuple[Rule, ...]:
    return (
        Rule("embeddings/embedding", "params/embedding/embedding"),
        *_dense("emb_dense", "widen", bias=True),
        *_dense("final_dense_1", "narrow", bias=True),
        *_dense("final_dense_2", "head", bias=True),
    )


def _official(model: nn.Module) -> KeyMap:
    """Names of `SparseTransformer` in google-research's `routing_transformer/sparse_transformer.py`."""
    return KeyMap((*_text_rules(), *_layers("decoder", "blocks_{i}")), prefix=_BODY, ignore=_SLOTS)


def _official_seq2seq(model: nn.Module) -> KeyMap:
    """The same with an encoder, whose embedding tensor2tensor makes outside of the model's body."""
    rules = (
        *_text_rules(),
        *_layers("encoder", "encoder_blocks_{i}"),
        *_layers("decoder", "blocks_{i}", source_attention=True),
    )
    rules = tuple(Rule(f"body/{rule.source}", rule.target, rule.transform) for rule in rules)
    table = f"symbol_modality_{model.source_vocab_size}_{model.width}/shared/weights_0"
    rules = (*rules, Rule(table, "params/source_embedding/embedding"))
    return KeyMap(rules, prefix="sparse_transformer/", ignore=_SLOTS)


def _official_image(model: nn.Module) -> KeyMap:
    """Names of `SparseImagetransformer` in `routing_transformer/sparse_image_transformer.py`."""
    rules = (
        Rule("rgb_target_emb_channel", "params/embedding", Axes("(c v) h -> c v h", c=model.channels)),
        Rule("pos_emb_0", "params/rows", Axes("1 l 1 h -> l h")),
        Rule("pos_emb_1", "params/columns", Axes("1 1 l h -> l h")),
        *_dense("final_dense", "head", bias=True),
        *_layers("decoder", "blocks_{i}"),
    )
    rules = _relu_layers(rules) if model.feed_forward == "relu" else rules
    return KeyMap(rules, prefix="sparse_imagetransformer/body/", ignore=_SLOTS)


# The first is the one that `save_pretrained` writes unless told otherwise.
KEY_MAPS = {"official": _official}
IMAGE_KEY_MAPS = {"official": _official_image}
SEQ2SEQ_KEY_MAPS = {"official": _official_seq2seq}


def official_fields(
    source: str | os.PathLike | Mapping[str, Any] | Source,
    hparams: str | os.PathLike | Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The fields of `RoutingTransformer` that an official checkpoint of a language model was made with.

    The shapes of its variables tell widths, depth, heads, clusters and reach of the relative positions. They do not
    tell the length of a row, the block, how far it looks back, the members of a cluster, nor rates:

        fields = official_fields("ckpt-3530000", "hparams.json")
        model, variables, report = zoo.load_pretrained("routing_transformer_pg19", "ckpt-3530000", **fields)

    Args:
        source: what `load_pretrained` takes.
        hparams: the checkpoint's `hparams.json`, or what is in it; None leaves out what the shapes do not tell, so
            that it is as the named model has it.

    Returns:
        Overrides for `zoo.create_model` and `zoo.load_pretrained`.

    Raises:
        WeightsError: if variables are missing by which this is told, or the layers' heads differ in a way that no
            fields describe.
    """
    opened = source if isinstance(source, Source) else open_source(source)
    shapes = {name.removeprefix(_BODY): tuple(array.shape) for name, array in opened.arrays.items()}
    where = opened.path or "the mapping"

    def shape(name: str) -> tuple[int, ...]:
        if name not in shapes:
            raise WeightsError(f"{where}: no variable {_BODY + name!r}, by which the model's fields are told")
        return shapes[name]

    vocab, narrow = shape("embeddings/embedding")
    width = shape("emb_dense/kernel")[1]
    layers = [int(found[1]) for name in shapes if (found := re.match(r"decoder_layer_(\d+)/", name))]
    depth = max(layers, default=0) + 1
    layer = "decoder_layer_{}/self_attention"
    heads = f"{layer}/self_attention/attention_nd"
    total = width // shape(heads.format(0) + "/dense/kernel")[0]
    hidden = shape(layer.format(0) + "/ffn/weight1/kernel")[1]

    def clusters(name: str, variable: str) -> list[tuple[int, ...]]:
        """The shapes of a variable in all layers, zeros where a layer lacks it."""
        return [shapes.get(f"{heads.format(i)}/{name}/{name}/{variable}", (0, 0, 0)) for i in range(depth)]

    means, projections = clusters("cluster_attention", "means"), clusters("cluster_attention", "projection_tensors")
    strided = clusters("cluster_strided_attention", "means")
    hashed = any(map(any, projections))
    routing = projections if hashed else means
    skipped = sum(sizes[0] == 0 for sizes in routing) % depth
    if len(set(routing[skipped:])) > 1 or any(map(any, routing[:skipped])) or len(set(strided)) > 1:
        counts = ", ".join(f"{a[0]} and {b[0]}" for a, b in zip(routing, strided))
        raise WeightsError(f"{where}: no fields describe layers with these routing and cluster-strided heads: {counts}")
    number, size, _ = routing[-1]
    fields = dict(
        vocab_size=vocab,
        embedding_width=narrow,
        width=width,
        depth=depth,
        hidden=hidden,
        routing_heads=number,
        cluster_strided_heads=strided[-1][0],
        local_heads=total - number - strided[-1][0],
        skip_first=skipped,
        hashed=hashed,
    )
    if number:
        fields["clusters"] = 2**size if hashed else size
    for field, name in (("local_relative", "local_nd"), ("routing_relative", "cluster_attention/cluster_attention")):
        tables = [shapes.get(f"{heads.format(i)}/{name}/relative_positions_keys/embeddings") for i in range(depth)]
        fields[field] = any(tables)
        if any(tables):
            fields["max_relative"] = (next(filter(None, tables))[0] - 1) // 2
    return fields if hparams is None else fields | _told(hparams, fields)


def _told(hparams: str | os.PathLike | Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """What only the hyperparameters tell."""
    if not isinstance(hparams, Mapping):
        hparams = json.loads(Path(hparams).read_text())
    told = {field: hparams[name] for name, field in _HPARAMS.items() if name in hparams}
    if "query_shape" in hparams:
        told["block"] = hparams["query_shape"][0]
        told["look"] = hparams["memory_flange"][0] // told["block"]
    if strided := told.get("strided_heads", 0):
        told["local_heads"] = fields["local_heads"] - strided
    return told
