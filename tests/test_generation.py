"""Filters against numpy, draws against their probabilities, cached steps against whole rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.cost import cost
from tests.language_models import (
    LENGTH,
    PATTERNS,
    RECURRENT,
    SOURCE,
    VOCABULARY,
    encoder_decoder,
    random_variables,
    rows,
    shapes_of,
    small,
    streamed,
)
from zoo.keymap import unflatten
from zoo.sequence.generation import generate, stream
from zoo.sequence.sampling import filter_logits

# Dtype, tolerance, pattern, and how much of a row is read at once; one of each kind reads a single token.
CACHED = [
    *(
        pytest.param(
            *("float64", 1e-10, pattern, (0, 1, 13) if pattern in "AWLGY" else (13,)),
            marks=() if pattern in ("A", "W", "G", "Y", "E") else pytest.mark.slow,
        )
        for pattern in PATTERNS
    ),
    *(
        pytest.param("float32", 1e-4, pattern, (0,), marks=() if pattern in "AY" else pytest.mark.slow)
        for pattern in "AGYEWNRTLHDM"
    ),
]


@functools.partial(jax.jit, static_argnums=0)
def forward(model, variables, tokens, inputs=None):
    return model.apply(variables, tokens, **(inputs or {}))


# Filters


def filtered_by_hand(logits, temperature, top_k, top_p):
    """Probabilities of one row, float64."""
    logits = np.asarray(logits, np.float64)
    # Sorted by falling logit, then by rising id.
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    if temperature == 0:
        return np.eye(len(logits))[order[0]]
    weights = np.exp((logits - logits.max()) / temperature)
    kept = order[: top_k or len(order)]
    if top_p is not None:
        total, nucleus = sum(weights[i] for i in kept), []
        while sum(weights[i] for i in nucleus) / total < top_p and len(nucleus) < len(kept):
            nucleus.append(kept[len(nucleus)])
        kept = nucleus
    found = np.zeros(len(logits))
    found[kept] = weights[kept]
    return found / found.sum()


@pytest.mark.parametrize(
    "temperature, top_k, top_p",
    [
        (0, None, None),
        (0, 3, 0.8),
        (0.3, None, None),
        (1, None, None),
        (1.0, 1, None),
        (0.7, 3, None),
        (1.3, VOCABULARY, 1.0),
        (1.0, None, 1e-6),
        (2.5, None, 0.35),
        (1.0, None, 0.8),
        (0.5, 5, 0.8),
        (2.5, 2, 0.35),
        (3.0, 12, 0.95),
    ],
)
def test_filters_by_hand(temperature, top_k, top_p):
    rng = np.random.default_rng(2)
    logits = rng.normal(size=(4, 3, VOCABULARY)).astype(np.float32) * 2
    # Equal ones in the second half.
    logits[2:] = np.round(logits[2:])
    with jax.enable_x64(True):
        found = filter_logits(jnp.asarray(logits, jnp.float64), temperature, top_k, top_p)
        assert found.shape == logits.shape and (found.max(-1) == 0).all()
        shares = np.asarray(jax.nn.softmax(found, -1))
    expected = np.apply_along_axis(filtered_by_hand, -1, logits, temperature, top_k, top_p)
    np.testing.assert_array_equal(shares > 0, expected > 0)
    np.testing.assert_allclose(shares, expected, rtol=1e-9)


def test_filters_of_known_probabilities():
    probabilities = jnp.asarray([0.1, 0.4, 0.05, 0.25, 0.2])
    logits = jnp.log(probabilities)

    def kept(**settings):
        shares = np.asarray(jax.nn.softmax(filter_logits(logits, **settings)))
        return {int(i): round(float(shares[i]), 4) for i in np.flatnonzero(shares)}

    assert kept(temperature=0) == {1: 1.0}
    assert kept(top_k=2) == {1: 0.6154, 3: 0.3846}
    assert kept(top_p=0.5) == {1: 0.6154, 3: 0.3846}
    assert kept(top_p=0.3) == {1: 1.0}
    # The nucleus is one of what top-k has left, where the first has 40 of 85 parts and the first two 65.
    assert kept(top_k=3, top_p=0.7) == {1: 0.6154, 3: 0.3846}
    assert kept(top_p=0.7) == {1: 0.4706, 3: 0.2941, 4: 0.2353}
    # And one of the distribution at that temperature, whose squares are 16 : 6.25 : 4 : 1 : 0.25.
    assert kept(temperature=0.5, top_p=0.58) == {1: 1.0}
    assert set(kept(temperature=0.5, top_p=0.59)) == {1, 3}
    # Small temperatures do not overflow; what is far behind has no probability then.
    assert kept(temperature=1e-30) == {1: 1.0}
    assert filter_logits(logits, 1e-30).dtype == jnp.float32


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(temperature=-0.1), "temperature must be at least 0 and finite, got -0.1"),
        (dict(temperature=float("nan")), "temperature"),
        (dict(temperature=float("inf")), "temperature"),
        (dict(top_k=0), "top_k must be from 1 to the 17 tokens there are, or None; got 0"),
        (dict(top_k=18), "top_k"),
        (dict(top_p=0.0), "top_p must be above 0 and at most 1, or None; got 0.0"),
        (dict(top_p=1.1), "top_p"),
        (dict(steps=0), "steps must be at least 1, got 0"),
        (dict(max_length=6), "max_length must be at least 7, to read 3 tokens and go on by 5"),
        (dict(prompt=np.zeros((1, 0), np.int32)), r"at least one row of at least one token, got \(1, 0\)"),
        (dict(prompt=np.array([[3, 17]])), "prompt must hold tokens from 0 to 16, it has 17"),
        (dict(prompt=np.array([[-1, 17]])), "it has -1"),
        (dict(piece=0), "piece must be at least 1 token, got 0"),
    ],
)
def test_settings_out_of_range(settings, message):
    model = small("A")
    options = dict(prompt=np.zeros((1, 3), np.int32), steps=5, key=jax.random.key(0)) | settings
    with pytest.raises(ValueError, match=message):
        stream(model, {}, **options)
    if "piece" not in settings:
        with pytest.raises(ValueError, match=message):
            generate(model, {}, **options)
    if {"temperature", "top_k", "top_p"} & settings.keys():
        with pytest.raises(ValueError, match=message):
            filter_logits(jnp.zeros(17), **settings)


# Cached steps


@pytest.mark.parametrize("dtype, tolerance, pattern, reads", CACHED)
def test_cached_steps_equal_whole_rows(dtype, tolerance, pattern, reads):
    """Of a row of which so much is read at once, and the rest one by one."""
    with jax.enable_x64(dtype == "float64"):
        model = small(pattern, param_dtype=jnp.dtype(dtype))
        variables = random_variables(model, dtype)
        tokens = rows()
        whole = np.asarray(forward(model, variables, tokens))
        assert whole.dtype == dtype and whole.std() > 0.3
        step = jax.jit(functools.partial(model.apply, method="step"))
        shapes = None
        for read in reads:
            if read:
                prefill = jax.jit(functools.partial(model.apply, max_length=LENGTH, method="prefill"))
                logits, state = prefill(variables, tokens[:, :read])
            else:
                state = model.apply(variables, len(tokens), LENGTH, method="initial_state")
                logits = jnp.zeros((2, 0, VOCABULARY))
            parts = [np.asarray(logits)]
            for token in tokens[:, read:].T:
                logits, state = step(variables, token, state)
                parts.append(np.asarray(logits)[:, None])
            np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, atol=tolerance, err_msg=f"{read} read")
            assert shapes in (None, jax.tree.map(jnp.shape, state))
            shapes = jax.tree.map(jnp.shape, state)
        # One program for all positions, whatever was read at once.
        assert step._cache_size() == 1


def state_of(model, room):
    variables = unflatten(shapes_of(model))
    return variables, jax.eval_shape(lambda v: model.apply(v, 2, room, method="initial_state"), variables)


@pytest.mark.parametrize("pattern", [*RECURRENT, "W", "YW"])
def test_a_step_is_the_same_however_far_it_may_go(pattern):
    model = small(pattern)
    (_, near), (_, far) = state_of(model, 64), state_of(model, 100_000)
    assert jax.tree.leaves(near) and near == far


def test_a_step_of_softmax_attention_costs_what_there_is_to_see():
    model, token = small("A"), jax.ShapeDtypeStruct((2,), jnp.int32)

    def flops_and_size(room):
        variables, state = state_of(model, room)
        counted = cost(functools.partial(model.apply, method="step"), variables, token, state)
        return counted.flops, sum(leaf.size for leaf in jax.tree.leaves(state))

    (flops, size), (more_flops, more) = flops_and_size(64), flops_and_size(128)
    # Keys and values of 64 more tokens in 2 rows of 32 channels; a multiply-add for each of them.
    assert more - size == 2 * 64 * 2 * 32 and more_flops - flops >= 2 * (more - size)


# Generation


@pytest.fixture(scope="module")
def causal():
    """A model, and its variables."""
    model = small("A")
    return model, random_variables(model)


@pytest.mark.parametrize("pattern", ["A", pytest.param("RW", marks=pytest.mark.slow), "Y"])
def test_greedy_is_the_argmax_of_whole_rows(pattern):
    model = small(pattern)
    variables, prompt = random_variables(model), rows(length=7)
    found = np.asarray(generate(model, variables, prompt, steps=LENGTH - 7, key=jax.random.key(0), temperature=0))
    assert found.shape == (2, LENGTH - 7) and found.dtype == np.int32
    row = prompt
    for number in range(LENGTH - 7):
        # Padded to one length, which the past does not see.
        padded = np.pad(row, [(0, 0), (0, LENGTH - row.shape[1])])
        best = np.asarray(forward(model, variables, padded))[:, row.shape[1] - 1].argmax(-1)
        np.testing.assert_array_equal(found[:, number], best)
        row = np.concatenate([row, found[:, number : number + 1]], axis=1)


def test_streams_and_fewer_steps_give_the_same(causal):
    model, variables = causal
    settings = dict(key=jax.random.key(3), temperature=1.3, top_k=9, top_p=0.9)
    prompt = rows(length=7)
    found, log_probs = generate(model, variables, prompt, steps=14, return_log_probs=True, **settings)
    assert len(np.unique(found)) > 4 and (found[0] != found[1]).any()
    row = jnp.concatenate([prompt, found], axis=1)
    shares = jax.nn.log_softmax(forward(model, variables, row), -1)[:, 6:-1]
    np.testing.assert_allclose(log_probs, jnp.take_along_axis(shares, found[..., None], -1)[..., 0], atol=1e-4)
    np.testing.assert_array_equal(generate(model, variables, prompt, steps=1, **settings), found[:, :1])
    streamed = stream(model, variables, prompt, steps=14, piece=5, max_length=50, **settings)
    assert streamed.compile_seconds > 0 and streamed.prompt_seconds > 0
    pieces = list(streamed.pieces)
    assert [one.shape for one in pieces] == [(2, size) for size in (1, 5, 5, 3)]
    np.testing.assert_array_equal(np.concatenate(pieces, axis=1), found)
    other = generate(model, variables, prompt, steps=14, **{**settings, "key": jax.random.key(4)})
    assert (np.asarray(other) != found).any()


@pytest.mark.slow
def test_rooms_do_not_show(causal):
    model, variables = causal
    settings = dict(steps=9, key=jax.random.key(3))
    expected = generate(model, variables, rows(length=7), **settings)
    np.testing.assert_array_equal(generate(model, variables, rows(length=7), max_length=99, **settings), expected)
    # As wide integers, and under a trace.
    wide = rows(length=7).astype(np.int64)
    np.testing.assert_array_equal(generate(model, variables, wide, **settings), expected)
    assert jax.eval_shape(lambda prompt: generate(model, variables, prompt, **settings), wide).shape == (2, 9)


@pytest.mark.parametrize("settings", [{}, dict(temperature=0.6, top_k=9, top_p=0.95)], ids=str)
def test_draws_follow_the_probabilities(causal, settings):
    """Pearson's statistic of first and second tokens over many rows of one prompt."""
    model, variables = causal
    many = 20_000
    prompt = np.repeat(rows(batch=1, length=2), many, axis=0)
    found = np.asarray(generate(model, variables, prompt, steps=2, key=jax.random.key(5), **settings))
    seconds = np.array([[*prompt[0], token] for token in range(VOCABULARY)], np.int32)
    logits = np.asarray(forward(model, variables, seconds))
    by_hand = functools.partial(filtered_by_hand, **{**dict(temperature=1, top_k=None, top_p=None), **settings})
    of_first = by_hand(logits[0, 1])
    common = int(of_first.argmax())
    of_second = by_hand(logits[common, 2])
    for tokens, shares in ((found[:, 0], of_first), (found[found[:, 0] == common, 1], of_second)):
        counts = np.bincount(tokens, minlength=VOCABULARY)
        assert not counts[shares == 0].any()
        expected = len(tokens) * shares[shares > 0]
        statistic = ((counts[shares > 0] - expected) ** 2 / expected).sum()
        freedom = max(len(expected) - 1, 1)
        # Mean and four standard deviations of the chi-square distribution.
        assert statistic < freedom + 4 * (2 * freedom) ** 0.5


@pytest.mark.slow
def test_what_else_a_model_takes():
    _, model, variables = encoder_decoder()
    inputs = dict(source=SOURCE, source_mask=SOURCE > 0)
    found = streamed(model, variables, [1], steps=8, key=jax.random.key(0), temperature=0, **inputs)
    row = np.array([[1, *found[:-1]]])
    assert found == forward(model, variables, row, inputs)[0].argmax(-1).tolist()
    hidden = dict(inputs, source_mask=np.ones((1, 8), bool))
    assert (forward(model, variables, row, hidden) != forward(model, variables, row, inputs)).any()
    with pytest.raises(TypeError, match="source"):
        generate(model, variables, row, steps=1, key=jax.random.key(0))
