"""The Routing Transformer's lucidrains form against its module, see `reference/make_routing_transformer.py`."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from tests.parity import REFERENCE, assert_gradients, assert_near, part
from tests.reference import routing
from tests.reference.weights import pseudo_normal, sample
from zoo.formats.readers import read_weights
from zoo.keymap import flatten
from zoo.routing_transformer.lucidrains import RoutingTransformerLucidrains

OUTPUT_TOLERANCE, GRADIENT_TOLERANCE = 2e-5, 2e-4


@functools.cache
def loaded(name: str):
    """The record of a model, the checkpoint that it was made with, and the model and variables loaded from it."""
    with np.load(REFERENCE / "routing_transformer.npz") as file:
        record = part(dict(file), f"{name}/")
    angles = np.arange(routing.LENGTH)[:, None]
    checkpoint = {}
    for key, shape in json.loads(str(record["shapes"])).items():
        shape = tuple(shape)
        if key.endswith("initted"):
            checkpoint[key] = np.asarray(True)
        elif key.endswith("inv_freq"):
            checkpoint[key] = 10000.0 ** -(np.arange(shape[0], dtype=np.float32) / shape[0])
        elif key == "sinu_pos_emb.emb":
            angle = angles * 10000.0 ** -(2 * np.arange(shape[1] // 2) / shape[1])
            checkpoint[key] = np.concatenate([np.sin(angle), np.cos(angle)], axis=1).astype(np.float32)
        else:
            named = "token_emb.weight" if key == "out.tensor" else key
            checkpoint[key] = routing.weight(named, shape)
    fields = dict(routing.MODELS[name][1], vocab_size=routing.VOCABULARY, length=routing.LENGTH)
    loaded = zoo.load_pretrained("routing_transformer_lucidrains_nano", checkpoint, membership="sequence", **fields)
    return record, checkpoint, *loaded


@pytest.mark.parametrize("name", routing.MODELS)
def test_logits_and_gradients_equal_the_module_s(name, tmp_path):
    record, _, model, variables, _ = loaded(name)
    tokens = jnp.asarray(routing.tokens())

    @jax.jit
    def run(variables):
        def objective(params):
            logits = model.apply({**variables, "params": params}, tokens)
            direction = pseudo_normal("direction", logits.shape).astype(logits.dtype)
            return (logits * direction).sum(), logits

        return jax.grad(objective, has_aux=True)(variables["params"])

    with jax.default_matmul_precision("highest"):
        gradients, logits = run(variables)
    logits = np.asarray(logits, np.float64)
    assert_near(sample("logits", logits, 256), record["logits"], OUTPUT_TOLERANCE, "logits")
    moments = [logits.mean(), np.sqrt(np.square(logits).mean())]
    np.testing.assert_allclose(moments, record["mean_rms"], rtol=0, atol=OUTPUT_TOLERANCE)

    # Gradients are shaped like the parameters, so saving them gives every one its reference name.
    path = tmp_path / "gradients.npz"
    zoo.save_pretrained(model, {**variables, "params": gradients}, path)
    named = read_weights(path)
    buffers = ("sinu_pos_emb.emb", "inv_freq", "means", "initted", "out.tensor")
    empty = {key for key, shape in json.loads(str(record["shapes"])).items() if 0 in shape}
    named = {key: x for key, x in named.items() if not key.endswith(buffers)}
    assert empty <= named.keys()
    assert_gradients(named, record, GRADIENT_TOLERANCE)


@pytest.mark.parametrize("name", routing.MODELS)
def test_a_training_step_moves_the_centroids_as_the_module_s_does(name):
    record, _, model, variables, _ = loaded(name)
    tokens = jnp.asarray(routing.tokens())

    @jax.jit
    def run(variables):
        rngs = {"dropout": jax.random.key(0)}
        return model.apply(variables, tokens, train=True, mutable=["centroids", "losses"], rngs=rngs)[1]

    with jax.default_matmul_precision("highest"):
        changed = run(variables)
    means = {path: x for path, x in flatten(changed["centroids"]).items() if path.endswith("means")}
    for path, expected in zip(means, part(record, "means/").values(), strict=True):
        np.testing.assert_allclose(means[path], expected, rtol=0, atol=2e-6, err_msg=path)
        assert np.abs(means[path] - flatten(variables["centroids"])[path]).max() > 1e-5
    losses = sum(jax.tree.leaves(changed["losses"]))
    np.testing.assert_allclose(losses, record["loss"].sum(), rtol=1e-5)


@pytest.mark.parametrize("name", routing.MODELS)
def test_a_checkpoint_is_written_as_it_was_read(name, tmp_path):
    _, checkpoint, model, variables, report = loaded(name)
    assert isinstance(model, RoutingTransformerLucidrains)
    assert report.naming == "lucidrains" and not report.ignored and not report.replaced
    path = tmp_path / "weights.safetensors"
    zoo.save_pretrained(model, variables, path)
    written = read_weights(path)
    assert written.keys() == checkpoint.keys()
    for key, expected in checkpoint.items():
        assert written[key].shape == expected.shape, key
        exact = not key.endswith(("inv_freq", "sinu_pos_emb.emb"))
        np.testing.assert_allclose(written[key], expected, rtol=0, atol=0 if exact else 1e-5, err_msg=key)
