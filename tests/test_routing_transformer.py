"""The Routing Transformer's models: sizes, causality, decoding, and centroids that training moves."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from zoo import registry
from zoo.keymap import flatten
from zoo.pretrained import abstract_variables
from zoo.routing_transformer import image as routing_image
from zoo.routing_transformer import lucidrains as routing_lucidrains
from zoo.routing_transformer import seq2seq as routing_seq2seq
from zoo.routing_transformer import text as routing_transformer

TEXT, IMAGE = "routing_transformer_nano", "routing_transformer_image_nano"
SEQ2SEQ, LUCIDRAINS = "routing_transformer_seq2seq_nano", "routing_transformer_lucidrains_nano"
FAMILIES = (routing_transformer, routing_image, routing_seq2seq, routing_lucidrains)


def parameters(model) -> int:
    """Numbers in the parameters and, as the published counts have it, in the means of the clusters."""
    leaves = flatten(abstract_variables(model))
    return sum(x.size for path, x in leaves.items() if path.startswith("params/") or path.endswith("/means"))


@pytest.mark.parametrize(
    ("name", "fields", "millions"),
    [
        ("enwik8_local_8k", {}, 307.7),
        ("enwik8_8k", {}, 171.8),
        ("enwik8_12k", {}, 168.9),
        ("wikitext103_4k", {}, 332.6),
        ("wikitext103_1k", {}, 415.9),
        ("pg19", {}, 448.0),
        ("pg19", dict(vocab_size=98_000), 582.7),
        ("cifar10", {}, 102.2),
        ("imagenet64", {}, 203.1),
    ],
)
def test_registered_configurations_have_the_analytic_sizes(name, fields, millions):
    # Layers with routing heads and those without are alike in themselves: two depths tell all others.
    model = zoo.create_model(f"routing_transformer_{name}", **fields)
    if isinstance(model, routing_transformer.RoutingTransformer):
        model = model.clone(length=1)
    skipped, depth = model.skip_first, model.depth

    def at(local, routed):
        return parameters(model.clone(skip_first=local, depth=local + routed))

    base = at(0, 1)
    local = at(1, 1) - base if skipped else 0
    routed = at(0, 2) - base
    assert (base + skipped * local + (depth - skipped - 1) * routed) / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize(
    ("name", "expected"), [("enwik8", 18_779_136), ("increment", 20_476_164), ("base", 54_119_840)]
)
def test_lucidrains_models_have_the_measured_sizes(name, expected):
    variables = abstract_variables(zoo.create_model(f"routing_transformer_lucidrains_{name}"))
    assert sum(x.size for x in jax.tree.leaves(variables["params"])) == expected


def test_lucidrains_encoder_has_the_measured_size():
    fields = dict(causal=False, gated=False, embedding_width=None, depth=1)
    params = abstract_variables(zoo.create_model("routing_transformer_lucidrains_base", **fields))["params"]
    assert 12 * sum(x.size for x in jax.tree.leaves(params["blocks_0"])) == 37_813_248


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__.rpartition(".")[2])
def test_every_variant_is_registered_and_sound(family):
    for name in family.VARIANTS:
        model = zoo.create_model(name)
        assert registry.family_of(name).module is type(model)
    nano = max(name for name in family.VARIANTS if name.endswith("nano"))
    leaves = flatten(abstract_variables(zoo.create_model(nano)))
    layer_of, last = registry.family_of(nano).layers(zoo.create_model(nano))
    layers = {layer_of(path.removeprefix("params/")) for path in leaves if path.startswith("params/")}
    assert layers == set(range(last + 1))


@functools.cache
def prepared(name: str, **fields):
    """A model in float64, its variables away from their initial values, tokens without repeats, and a source."""
    with jax.enable_x64(True):
        model = zoo.create_model(name, param_dtype=jnp.float64, **fields)
        rng = np.random.default_rng(0)
        tokens = np.stack([rng.permutation(model.vocab_size)[:ROW] for _ in range(2)]).astype(np.int32)
        extra = {"source": rng.integers(0, 17, (2, 27)).astype(np.int32)} if name == SEQ2SEQ else {}

        @jax.jit
        def initialise(key):
            variables = model.init(key, jnp.asarray(tokens), **jax.tree.map(jnp.asarray, extra))

            def moved(x):
                return x + 0.05 * jax.random.normal(key, x.shape, x.dtype) if x.dtype == jnp.float64 else x

            return jax.tree.map(moved, variables)

        tokens, extra = jax.tree.map(jnp.asarray, (tokens, extra))
        return model, initialise(jax.random.key(0)), tokens, extra


# Longer than windows and blocks of the models below, and divisible by neither.
ROW, PROMPT = 27, 17
SMALL = dict(window=5, block=8, vocab_size=32, width=32)
CASES = {
    "text": (TEXT, dict(SMALL, depth=2, skip_first=1, hidden=48)),
    "text, prefix": (TEXT, dict(SMALL, depth=1, membership="prefix")),
    "image, hashed and strided": (IMAGE, dict(SMALL, depth=1, strided_heads=4, hashed=True)),
    "lucidrains": (LUCIDRAINS, dict(SMALL, depth=1, head_dim=8, length=40, reversible=True)),
    "seq2seq": (SEQ2SEQ, dict(SMALL, depth=1, encoder_depth=1)),
    "seq2seq, prefix": (SEQ2SEQ, dict(SMALL, depth=1, encoder_depth=1, membership="prefix")),
}


@functools.cache
def whole(model):
    """The logits of whole rows as a jitted function, compiled once for a model."""
    return jax.jit(lambda variables, tokens, extra: model.apply(variables, tokens, **extra))


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=pytest.mark.slow) if case != "lucidrains" else case for case in CASES],
)
def test_decoding_gives_what_whole_rows_give_and_nothing_leaks(case):
    name, fields = CASES[case]
    model, variables, tokens, extra = prepared(name, **fields)

    @jax.jit
    def decode(variables, tokens, extra):
        arguments = (ROW + 3, *extra.values())
        empty = model.apply(variables, 2, *arguments, method="initial_state")
        first, _ = model.apply(variables, tokens[:, 0], empty, method="step")
        prompt, state = model.apply(variables, tokens[:, :PROMPT], *arguments, method="prefill")
        assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, empty)

        def step(state, token):
            logits, state = model.apply(variables, token, state, method="step")
            return state, logits

        # A scan wants states of one shape.
        _, rest = jax.lax.scan(step, state, tokens[:, PROMPT:].T)
        return first, prompt, rest

    with jax.enable_x64(True):
        full = whole(model)(variables, tokens, extra)
        assert full.shape == (*tokens.shape, model.vocab_size) and full.dtype == jnp.float64
        changed = whole(model)(variables, tokens.at[:, PROMPT:].set(tokens[:, PROMPT:][:, ::-1]), extra)
        first, prompt, rest = decode(variables, tokens, extra)
    np.testing.assert_allclose(changed[:, :PROMPT], full[:, :PROMPT], rtol=0, atol=1e-12)
    assert np.abs(np.subtract(changed, full)[:, PROMPT:]).max() > 1e-3
    np.testing.assert_allclose(first, full[:, 0], rtol=0, atol=1e-10)
    np.testing.assert_allclose(prompt, full[:, :PROMPT], rtol=0, atol=1e-10)
    np.testing.assert_allclose(rest.swapaxes(0, 1), full[:, PROMPT:], rtol=0, atol=1e-10)


def test_the_published_membership_leaks_the_future_and_decodes_by_prefix():
    name, fields = CASES["text, prefix"]
    prefix, variables, tokens, _ = prepared(name, **fields)
    model = prefix.clone(membership="sequence")
    prefill = jax.jit(lambda variables, tokens: model.apply(variables, tokens, ROW, method="prefill")[0])
    with jax.enable_x64(True):
        changed = tokens.at[:, PROMPT:].set(tokens[:, PROMPT:][:, ::-1] ^ 1)
        first, second = (whole(model)(variables, rows, {}) for rows in (tokens, changed))
        expected, decoded = whole(prefix)(variables, tokens, {}), prefill(variables, tokens)
    assert np.abs(np.subtract(first, second)[:, :PROMPT]).max() > 1e-3
    np.testing.assert_allclose(decoded, expected, rtol=0, atol=1e-12)


@pytest.mark.slow
def test_documents_of_a_packed_row_do_not_see_each_other():
    model, variables, tokens, _ = prepared(TEXT, **CASES["text"][1])
    with jax.enable_x64(True):
        segments = jnp.asarray(np.arange(ROW) >= 8, jnp.int32)[None].repeat(2, 0)
        packed = whole(model)(variables, tokens, {"segments": segments})
        alone = whole(model)(variables, tokens[:, 8:], {})
    np.testing.assert_allclose(packed[:, 8:], alone, rtol=0, atol=1e-12)


@functools.cache
def training_step(model):
    """A jitted function to the loss, its gradients, and the collections that a training step changes."""

    def run(variables, tokens, extra):
        rest = {name: value for name, value in variables.items() if name != "params"}

        def objective(params):
            logits, changed = model.apply(
                {"params": params, **rest},
                tokens,
                train=True,
                mutable=["centroids", "losses"],
                rngs={"dropout": jax.random.key(1)},
                **extra,
            )
            return jax.nn.log_softmax(logits)[..., 0].mean() + sum(jax.tree.leaves(changed["losses"])), changed

        (loss, changed), gradients = jax.value_and_grad(objective, has_aux=True)(variables["params"])
        return loss, changed, gradients

    return jax.jit(run)


DROPPED = dict(attention_dropout=0.1, dropout=0.1, hidden_dropout=0.1, commitment=1.0)
TRAINED = {
    "text": (TEXT, dict(SMALL, **DROPPED, depth=1, target_dropout=0.1, embedding_dropout=0.1)),
    "image": (IMAGE, dict(SMALL, **DROPPED, depth=1, membership="sequence", cluster_strided_heads=2, local_heads=4)),
    "seq2seq": (SEQ2SEQ, dict(SMALL, **DROPPED, depth=1, encoder_depth=1, input_dropout=0.1)),
}


@pytest.mark.parametrize(
    "case", ["text", *(pytest.param(case, marks=pytest.mark.slow) for case in ("image", "seq2seq"))]
)
def test_training_moves_centroids_and_sows_losses(case):
    name, fields = TRAINED[case]
    model, variables, tokens, extra = prepared(name, **fields)
    with jax.enable_x64(True):
        loss, changed, gradients = training_step(model)(variables, tokens, extra)
        again, repeated, _ = training_step(model)(variables, tokens, extra)
    before, after = flatten(variables["centroids"]), flatten(changed["centroids"])
    assert np.isfinite(loss) and loss.item() == again.item()
    for path, value in after.items():
        assert np.isfinite(value).all() and not np.array_equal(value, before[path]), path
        np.testing.assert_array_equal(value, flatten(repeated["centroids"])[path], err_msg=path)
    losses = [x.item() for x in jax.tree.leaves(changed["losses"])]
    assert len(losses) == sum(path.endswith("/means") for path in after) and min(losses) > 0
    for path, gradient in flatten(gradients).items():
        assert np.isfinite(gradient).all() and np.any(np.asarray(gradient)), path


def test_only_training_with_a_mutable_collection_changes_anything():
    model, variables, tokens, _ = prepared(TEXT, **CASES["text"][1])

    def changed(variables, train, mutable):
        rngs = {"dropout": jax.random.key(0)} if train else {}
        return model.apply(variables, tokens, train=train, mutable=mutable, rngs=rngs)[1]

    with jax.enable_x64(True):
        same = jax.jit(changed, static_argnums=(1, 2))(variables, False, ("centroids", "losses"))
        assert jax.eval_shape(lambda v: changed(v, True, ("losses",)), variables).keys() == {"losses"}
    assert same.keys() == {"centroids"}
    jax.tree.map(np.testing.assert_array_equal, same["centroids"], variables["centroids"])


def test_lucidrains_centroids_start_from_the_first_batch_that_is_trained_on():
    model, variables, tokens, extra = prepared(LUCIDRAINS, **CASES["lucidrains"][1])
    with jax.enable_x64(True):
        _, changed, _ = training_step(model)(variables, tokens, extra)
        _, further, _ = training_step(model)({**variables, "centroids": changed["centroids"]}, tokens, extra)
    first, second = (c["centroids"]["blocks_0"]["attention"]["routing"] for c in (changed, further))
    # Sums of k-means are unit vectors; one step of the average leaves their lengths nearly so.
    assert first["initted"] and np.linalg.norm(first["means"], axis=-1) == pytest.approx(1, abs=2e-3)
    assert 0 < np.abs(np.subtract(second["means"], first["means"])).max() < 2e-3


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        (TEXT, dict(membership="nearst"), "did you mean 'nearest'"),
        (TEXT, dict(local_heads=3), "the number of heads must divide width=128"),
        (TEXT, dict(skip_first=9), "skip_first must be from 0 to depth=4"),
        (TEXT, dict(max_relative=0), "relative positions need max_relative"),
        (IMAGE, dict(length=63), "length must be height \\* width \\* channels = 64"),
        (SEQ2SEQ, dict(strided_heads=4), "routing and local heads only"),
        (LUCIDRAINS, dict(window=48), "window=48 must divide length=256"),
        (LUCIDRAINS, dict(local_heads=(2, 2)), "one for each of 4 layers"),
        (LUCIDRAINS, dict(norm="layers"), "did you mean 'layer'"),
    ],
)
def test_fields_that_do_not_fit_are_errors(name, fields, message):
    with pytest.raises(ValueError, match=message):
        zoo.create_model(name, **fields)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        (IMAGE, dict(cluster_strided_heads=2, routing_heads=4), "cluster_strided_heads rank all tokens"),
        (TEXT, dict(membership="sequence", share_qk=False), "share_qk=False have no strictly causal"),
        (LUCIDRAINS, dict(membership="sequence", memories=1), "memories or with share_qk=False"),
    ],
)
def test_models_without_a_step_say_so(name, fields, message):
    model = zoo.create_model(name, depth=1, **fields)
    with pytest.raises(NotImplementedError, match=message):
        jax.eval_shape(lambda v: model.apply(v, 1, 8, method="initial_state"), abstract_variables(model))
