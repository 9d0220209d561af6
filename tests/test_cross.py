"""Cross-attention primitives against loops in float64, torchvision's RoI-align, and what each promises."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import cross
from tests.parity import REFERENCE
from tests.reference.weights import pseudo_normal

# One program each and not one for every operation, which would take most of the time.
jit = functools.partial(jax.jit, static_argnames=("return_weights", "implementation", "scale"))
attention_rollout = jax.jit(cross.attention_rollout, static_argnames=("head_fusion", "residual", "token"))
select_tokens = jax.jit(cross.select_tokens, static_argnames=("ratio", "prefix"))
take_tokens = jax.jit(cross.take_tokens)
global_local_attention = jit(cross.global_local_attention)
pairwise_attention = jit(cross.pairwise_attention)
roi_align = jax.jit(cross.roi_align, static_argnames=("size", "sampling_ratio"))
pool_parts = jax.jit(cross.pool_parts, static_argnames="scale")
part_attention = jit(cross.part_attention)
mix_scales = jax.jit(cross.mix_scales)
bilateral_attention = jit(cross.bilateral_attention)
asymmetry_signature = jax.jit(cross.asymmetry_signature)

RECORD = np.load(REFERENCE / "cross.npz")
RNG = np.random.default_rng(0)
close = functools.partial(np.testing.assert_allclose, atol=1e-5)
exact = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12)


def normal(*shape: int, dtype=jnp.float32):
    return jnp.asarray(RNG.standard_normal(shape).astype(dtype))


def softmax(logits):
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def attend(query, key, value, scale=None):
    """One image after the other, `(B, N, H, D)`: output and weights `(B, H, N, M)`, in float64 numpy."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    outputs, weights = [], []
    for q, k, v in zip(query, key, value, strict=True):
        heads = [softmax(q[:, i] @ k[:, i].T * (scale or q.shape[-1] ** -0.5)) for i in range(q.shape[1])]
        weights.append(np.stack(heads))
        outputs.append(np.stack([head @ v[:, i] for i, head in enumerate(heads)], axis=1))
    return np.stack(outputs), np.stack(weights)


def layers(count: int, batch: int = 2, heads: int = 3, tokens: int = 6, dtype=jnp.float32):
    logits = RNG.standard_normal((count, batch, heads, tokens, tokens))
    return [jnp.asarray(layer.astype(dtype)) for layer in softmax(logits)]


class TestRollout:
    @pytest.mark.parametrize("fusion", ("mean", "max", "min"))
    def test_is_the_product_with_the_latest_layer_on_the_left(self, fusion):
        weights = layers(3)
        expected = np.eye(6)
        for layer in weights:
            fused = getattr(np.asarray(layer, np.float64), fusion)(1)
            fused /= fused.sum(-1, keepdims=True)
            expected = (0.3 * np.eye(6) + 0.7 * fused) @ expected
        rolled = attention_rollout(weights, head_fusion=fusion, residual=0.3)
        assert rolled.dtype == jnp.float32
        np.testing.assert_allclose(rolled, expected, atol=1e-6)
        np.testing.assert_allclose(rolled.sum(-1), 1, atol=1e-6)
        row = attention_rollout(weights, head_fusion=fusion, residual=0.3, token=2)
        np.testing.assert_allclose(row, expected[:, 2], atol=1e-6)

    def test_the_identity_stays_the_identity(self):
        eye = jnp.broadcast_to(jnp.eye(5), (2, 3, 5, 5))
        np.testing.assert_array_equal(attention_rollout([eye] * 4), eye[:, 0])

    def test_a_row_without_a_minimum_is_the_identity(self):
        """Two heads that look at different tokens have no weight in common."""
        one, other = jnp.asarray([[0, 1.0, 0]] * 3), jnp.asarray([[0, 0, 1.0]] * 3)
        rolled = attention_rollout([jnp.stack([one, other])[None]], head_fusion="min", residual=0.0)
        np.testing.assert_array_equal(rolled[0], np.eye(3))

    def test_has_no_gradient_and_is_wide(self):
        weights = layers(2)
        gradients = jax.grad(lambda weights: attention_rollout(weights)[:, 0].std())(weights)
        assert not any(np.asarray(gradient).any() for gradient in gradients)
        assert attention_rollout([layer.astype(jnp.bfloat16) for layer in weights]).dtype == jnp.float32
        with jax.enable_x64(True):
            assert attention_rollout(layers(1, dtype=jnp.float64)).dtype == jnp.float64

    @pytest.mark.parametrize(
        ("weights", "options", "words"),
        [
            ([], {}, "weights is empty"),
            ([(1, 1, 2, 2), (1, 1, 3, 3)], {}, "must all have one shape, got"),
            ([(1, 1, 2, 2)], dict(head_fusion="mena"), "unknown head_fusion 'mena'; did you mean 'mean'"),
            ([(1, 1, 2, 2)], dict(residual=1.0), "residual must be at least 0 and below 1, got 1.0"),
            ([(1, 1, 2, 2)], dict(token=2), "token must be from 0 to 1, got 2"),
        ],
    )
    def test_errors(self, weights, options, words):
        with pytest.raises(ValueError, match=words):
            cross.attention_rollout([jnp.ones(shape) for shape in weights], **options)


class TestSelection:
    @pytest.mark.parametrize(
        ("tokens", "ratio", "count"), [(784, 0.1, 78), (196, 0.3, 58), (100, 0.29, 29), (5, 0.1, 1), (7, 1.0, 7)]
    )
    def test_how_many(self, tokens, ratio, count):
        chosen = jax.eval_shape(lambda x: select_tokens(x, ratio), jnp.zeros((2, tokens + 1)))
        assert chosen.shape == (2, count + 1) and chosen.dtype == jnp.int32

    def test_the_best_first_and_ties_by_index(self):
        scores = jnp.asarray([[9.0, 1, 5, 5, 0, 7], [0.0, 2, 2, 2, 2, 2]])
        np.testing.assert_array_equal(select_tokens(scores, 0.6), [[0, 5, 2, 3], [0, 1, 2, 3]])
        np.testing.assert_array_equal(select_tokens(scores, 0.5, prefix=2), [[0, 1, 5, 2], [0, 1, 2, 3]])
        np.testing.assert_array_equal(select_tokens(scores, 0.4, prefix=0), [[0, 5], [1, 2]])

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (dict(ratio=0.0), "ratio must be above 0 and at most 1, got 0.0"),
            (dict(ratio=1.1), "got 1.1"),
            (dict(ratio=0.5, prefix=6), "prefix must be from 0 to 5 for 6 tokens, got 6"),
        ],
    )
    def test_errors(self, options, words):
        with pytest.raises(ValueError, match=words):
            select_tokens(jnp.zeros((1, 6)), **options)


class TestGlobalLocal:
    def test_all_tokens_are_full_attention_in_the_order_of_their_rank(self):
        query, key, value = (normal(2, 7, 3, 4) for _ in range(3))
        indices = select_tokens(normal(2, 7), 1.0)
        out, weights = global_local_attention(query, key, value, indices, return_weights=True)
        expected, expected_weights = attend(query, key, value)
        back = jnp.argsort(indices, axis=1)
        close(take_tokens(out, back), expected)
        close(take_tokens(weights.swapaxes(1, 2), back), np.swapaxes(expected_weights, 1, 2))

    def test_other_tokens_count_only_as_keys_and_values(self):
        with jax.enable_x64(True):
            query, key, value = (normal(2, 9, 2, 3, dtype=jnp.float64) for _ in range(3))
            indices = select_tokens(normal(2, 9), 0.25)
            out, pullback = jax.vjp(lambda q, k, v: global_local_attention(q, k, v, indices), query, key, value)
            expected = [np.asarray(x)[image, np.asarray(indices)[image]] for image in range(2) for x in (query,)]
            exact(out, attend(np.stack(expected), key, value)[0])
            exact(out, global_local_attention(jnp.stack(expected), key, value))
            gradients = pullback(normal(*out.shape, dtype=jnp.float64))
        chosen = np.zeros((2, 9), bool)
        np.put_along_axis(chosen, np.asarray(indices), True, axis=1)
        for gradient, everywhere in zip(gradients, (False, True, True)):
            moved = np.asarray(gradient).any((2, 3))
            np.testing.assert_array_equal(moved, chosen | everywhere)

    def test_indices_want_all_queries(self):
        with pytest.raises(ValueError, match="query has 2 tokens and key 5; indices select from the queries of all"):
            global_local_attention(
                normal(1, 2, 1, 2), normal(1, 5, 1, 2), normal(1, 5, 1, 2), jnp.zeros((1, 2), jnp.int32)
            )


class TestPairwise:
    def test_one_softmax_over_both_images(self):
        with jax.enable_x64(True):
            query, key, value = (normal(3, 5, 2, 4, dtype=jnp.float64) for _ in range(3))
            partner = jnp.asarray([2, 0, 1])
            both = [np.concatenate([x, np.asarray(x)[np.asarray(partner)]], axis=1) for x in (key, value)]
            expected, expected_weights = attend(query, *both, scale=0.7)
            out, weights = pairwise_attention(query, key, value, partner, scale=0.7, return_weights=True)
            exact(out, expected)
            exact(weights, expected_weights)
            exact(weights.sum(-1), 1)
            exact(pairwise_attention(query, key, value, (key[partner], value[partner]), scale=0.7), expected)

    @pytest.mark.parametrize("explicit", (False, True))
    def test_an_image_that_is_its_own_partner(self, explicit):
        query, key, value = (normal(2, 6, 2, 4) for _ in range(3))
        partner = (key, value) if explicit else jnp.arange(2)
        close(pairwise_attention(query, key, value, partner), attend(query, key, value)[0])

    @pytest.mark.parametrize("how", ("mask", "outside", "explicit"))
    def test_without_a_partner_an_image_attends_to_itself(self, how):
        """Nor does anything reach it from what stands in the partner's place, not even what is no number."""
        query, key, value = (normal(3, 4, 2, 3) for _ in range(3))
        mask = jnp.asarray([True, False, False])
        bad = key.at[2].set(jnp.nan), value.at[2].set(jnp.inf)

        def run(query, key, value):
            if how == "mask":
                return pairwise_attention(query, key, value, jnp.asarray([1, 2, 0]), mask)
            if how == "outside":
                return pairwise_attention(query, key, value, jnp.asarray([1, -1, 3]))
            stored = bad[0][jnp.asarray([1, 2, 2])], bad[1][jnp.asarray([1, 2, 2])]
            return pairwise_attention(query, key, value, stored, mask)

        out, pullback = jax.vjp(run, query, *((key, value) if how == "explicit" else bad))
        alone, _ = attend(query, key, value)
        paired = attend(query[:1], *(np.concatenate([x[:1], x[1:2]], axis=1) for x in (key, value)))[0]
        close(out[:1], paired)
        close(out[1], alone[1])
        for gradient in pullback(out.at[2].set(0)):
            assert np.isfinite(gradient[:2]).all() and gradient[1].any()

    def test_gradients_reach_the_partner(self):
        query, key, value = (normal(2, 3, 1, 2) for _ in range(3))
        run = jax.grad(lambda key: pairwise_attention(query, key, value, jnp.asarray([1, 0]))[0].sum())
        assert np.asarray(run(key)).any((1, 2, 3)).all()


class TestRoiAlign:
    @pytest.mark.parametrize("name", [key[4:] for key in RECORD if key.startswith("out/")])
    def test_torchvision(self, name):
        size, ratio = name.split("/")
        size = tuple(map(int, size.split("x")))
        with jax.enable_x64(True):
            features, boxes = jnp.asarray(pseudo_normal("features", (2, 9, 14, 3))), jnp.asarray(RECORD["boxes"])
            out, pullback = jax.vjp(lambda features: roi_align(features, boxes, size, int(ratio)), features)
            exact(out, RECORD[f"out/{name}"])
            (gradient,) = pullback(jnp.asarray(pseudo_normal("direction", out.shape)))
            exact(gradient, RECORD[f"gradient/{name}"])

    def test_half_precision_is_computed_wide(self):
        features, boxes = normal(1, 6, 6, 4).astype(jnp.bfloat16), jnp.asarray([[[0.1, 0.2, 0.9, 0.8]]])
        out = roi_align(features, boxes, (3, 3))
        wide = roi_align(features.astype(jnp.float32), boxes, (3, 3))
        assert out.dtype == jnp.bfloat16
        np.testing.assert_array_equal(out, wide.astype(jnp.bfloat16))

    def test_gradients_of_boxes_are_finite(self):
        boxes = jnp.asarray(RECORD["boxes"], jnp.float32)
        gradient = jax.grad(lambda boxes: jnp.sin(roi_align(normal(2, 9, 14, 3), boxes, (4, 4))).sum())(boxes)
        assert np.isfinite(gradient).all() and gradient.any()

    def test_a_part_of_whole_tokens_is_those_tokens(self):
        """Cells of one token's size with one sample each are the tokens; pooled they are their means."""
        features = normal(2, 4, 8, 3)
        boxes = jnp.broadcast_to(jnp.asarray([0.25, 0.0, 0.75, 1.0]), (2, 1, 4))
        parts = roi_align(features, boxes, (4, 4), 1)
        close(parts[:, 0], features[:, :, 2:6])
        close(pool_parts(parts, 1)[:, 0], features[:, :, 2:6].reshape(2, 16, 3))
        pooled = np.asarray(features[:, :, 2:6]).reshape(2, 2, 2, 2, 2, 3).mean((2, 4))
        close(pool_parts(parts, 2)[:, 0], pooled.reshape(2, 4, 3))

    def test_errors(self):
        features, boxes = normal(1, 4, 4, 2), jnp.zeros((1, 1, 4))
        with pytest.raises(ValueError, match="size must be a pair of positive numbers of cells"):
            roi_align(features, boxes, (0, 4))
        with pytest.raises(ValueError, match="sampling_ratio must be at least 1, got 0"):
            roi_align(features, boxes, (2, 2), 0)
        with pytest.raises(ValueError, match="scale must divide the 8x6 cells of a part, got 4"):
            pool_parts(normal(1, 2, 8, 6, 3), 4)


class TestParts:
    @pytest.mark.parametrize("shared", (False, True))
    def test_every_part_asks_all_tokens(self, shared):
        with jax.enable_x64(True):
            query = normal(2, 3, 4, 2, 5, dtype=jnp.float64)
            key, value = (normal(2, *(() if shared else (3,)), 6, 2, 5, dtype=jnp.float64) for _ in range(2))
            out, weights = part_attention(query, key, value, return_weights=True)
            for part in range(3):
                of_part = (key, value) if shared else (key[:, part], value[:, part])
                expected = attend(query[:, part], *of_part)
                exact(out[:, part], expected[0])
                exact(weights[:, part], expected[1])

    def test_errors(self):
        query, key = normal(1, 3, 2, 1, 2), normal(1, 2, 5, 1, 2)
        with pytest.raises(ValueError, match=r"or \(B, 3, N, H, D\) for the 3 parts of query; got"):
            cross.part_attention.__wrapped__(query, key, key)
        with pytest.raises(ValueError, match="must both be"):
            cross.part_attention.__wrapped__(query, key[:, 0], key)

    def test_scales_are_mixed_by_a_softmax(self):
        outputs = [normal(2, 4, 5) for _ in range(3)]
        mixed, weights = mix_scales(outputs, jnp.zeros((4, 3)))
        close(weights, 1 / 3)
        close(mixed, np.mean(outputs, axis=0))
        mixed, weights = mix_scales(outputs, normal(4, 3))
        np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)
        close(mixed, np.einsum("rs,sbrc->brc", weights, outputs))
        one_hot = jnp.where(jnp.arange(3) == 1, 0.0, -jnp.inf)
        np.testing.assert_array_equal(mix_scales(outputs, jnp.broadcast_to(one_hot, (4, 3)))[0], outputs[1])
        with pytest.raises(ValueError, match="logits are for 2 scales, outputs has 3"):
            mix_scales(outputs, jnp.zeros((4, 2)))


class TestBilateral:
    def test_halves_attend_to_each_other(self):
        with jax.enable_x64(True):
            query, key, value = (normal(2, 3, 4, 2, 5, dtype=jnp.float64) for _ in range(3))

            def half(x, right):
                x = np.flip(x, 2)[:, :, :2] if right else x[:, :, :2]
                return np.asarray(x).reshape(2, 6, 2, 5)

            outputs, weights = bilateral_attention(query, key, value, return_weights=True)
            for right in (False, True):
                expected = attend(half(query, right), half(key, not right), half(value, not right))
                exact(outputs[right].reshape(2, 6, 2, 5), expected[0])
                exact(weights[right], expected[1])

    def test_a_mirror_symmetric_map_has_no_asymmetry(self):
        half = normal(2, 3, 2, 2, 4)
        maps = [jnp.concatenate([x, x[:, :, ::-1]], axis=2) for x in (half, normal(*half.shape), normal(*half.shape))]
        left, right = bilateral_attention(*maps)
        signature = asymmetry_signature(*(x.reshape(2, 3, 2, 8) for x in (left, right)))
        np.testing.assert_array_equal(signature, np.zeros((2, 8)))

    def test_a_map_and_its_mirror_image_have_one_signature(self):
        maps = [normal(2, 3, 6, 2, 4) for _ in range(3)]
        (left, right), (other_left, other_right) = (
            bilateral_attention(*(x[:, :, ::step] for x in maps)) for step in (1, -1)
        )
        np.testing.assert_array_equal(left, other_right)
        np.testing.assert_array_equal(right, other_left)
        signatures = [
            asymmetry_signature(*(x.reshape(2, 3, 3, 8) for x in pair))
            for pair in ((left, right), (other_left, other_right))
        ]
        np.testing.assert_array_equal(*signatures)
        expected = np.abs(np.asarray(left, np.float64) - np.asarray(right, np.float64)).mean((1, 2))
        close(signatures[0], expected.reshape(2, 8))

    def test_an_odd_width_has_no_halves(self):
        x = normal(1, 2, 5, 1, 2)
        with pytest.raises(ValueError, match="a map of 2x5 tokens has no halves; .* such as 4 or 6"):
            bilateral_attention(x, x, x)


def calls():
    """Every attention, of operands `(B, N, H, D)` with six tokens to be a map of 2x3, or of 2x2 and 2 more."""
    maps, partner, indices = (2, 4), jnp.asarray([1, 0]), jnp.asarray([[0, 3], [0, 5]])
    return {
        "global_local": lambda q, k, v, **how: global_local_attention(q, k, v, indices, **how),
        "pairwise": lambda q, k, v, **how: pairwise_attention(q, k, v, partner, **how),
        "part": lambda q, k, v, **how: part_attention(q.reshape(2, 2, 4, 2, 4), k, v, **how),
        "bilateral": lambda q, k, v, **how: bilateral_attention(*(x.reshape(2, *maps, 2, 4) for x in (q, k, v)), **how),
    }


@pytest.mark.parametrize("name", calls())
def test_dtypes_jit_and_implementations(name):
    call = calls()[name]
    operands = [normal(2, 8, 2, 4) for _ in range(3)]
    expected, weights = call(*operands, return_weights=True)
    for implementation in (None, "xla", ("pallas_tpu", "xla")):
        run = jax.jit(functools.partial(call, implementation=implementation))
        jax.tree.map(close, run(*operands), expected)
    half, half_weights = call(*(x.astype(jnp.bfloat16) for x in operands), return_weights=True)
    for leaf, other in zip(jax.tree.leaves(half), jax.tree.leaves(expected)):
        assert leaf.dtype == jnp.bfloat16
        np.testing.assert_allclose(leaf.astype(jnp.float32), other, atol=0.05)
    for leaf, other in zip(jax.tree.leaves(half_weights), jax.tree.leaves(weights)):
        assert leaf.dtype == jnp.float32
        np.testing.assert_allclose(leaf.sum(-1), 1, atol=1e-5)
        np.testing.assert_allclose(leaf, other, atol=0.05)
    with pytest.raises(NotImplementedError, match="pallas_tpu: not written for this op"):
        call(*operands, implementation="pallas_tpu")


@pytest.mark.parametrize("name", calls())
def test_gradients_are_those_of_finite_differences(name):
    with jax.enable_x64(True):
        operands = [normal(2, 8, 2, 4, dtype=jnp.float64) for _ in range(3)]
        along = [normal(*x.shape, dtype=jnp.float64) for x in operands]

        @jax.jit
        def objective(step):
            out = calls()[name](*(x + step * move for x, move in zip(operands, along)))
            return sum(jnp.sin(leaf).sum() for leaf in jax.tree.leaves(out))

        difference = (objective(1e-5) - objective(-1e-5)) / 2e-5
        np.testing.assert_allclose(jax.grad(objective)(0.0), difference, rtol=1e-7)
