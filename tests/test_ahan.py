"""AHAN: what the paper tells of its streams, what each layout costs, and that training alone sees the twin."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from kernels.cost import cost
from kernels.cross import pairwise_attention, pool_parts, roi_align
from tests.variables import filled
from zoo import registry
from zoo.ahan import AHAN
from zoo.ahan_streams import FacialAsymmetry, HierarchicalCrossAttention
from zoo.backbone import with_backbone
from zoo.face_regions import CANONICAL_BOXES, REGIONS, check_boxes, mirror_boxes
from zoo.keymap import flatten
from zoo.pretrained import abstract_variables

# 16 patches; 16, 4 and 1 queries.
TINY = dict(image_size=8, patch=2, dim=16, num_heads=2, depths=(2,), embedding_dim=8, pair_layers=(2, 2), num_classes=5)
close = functools.partial(np.testing.assert_allclose, atol=1e-5)
BOXES = np.asarray(CANONICAL_BOXES, np.float32)


def tiny(**overrides):
    return zoo.create_model("ahan_nano", **{**TINY, **overrides})


def plain(**overrides):
    """Without the streams, which TA-PWCA has nothing to do with."""
    return tiny(hca=False, faam=False, **overrides)


def coarse(**overrides):
    """With one of the streams at one of its scales: there is less to compile."""
    return tiny(faam=False, scales=(4,), **overrides)


def normal(*shape: int, seed: int = 0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


@functools.cache
def images(batch: int = 3):
    return normal(batch, 8, 8, 3)


def drawn(abstract):
    laws = {"kernel": (0, 0.3), "scale": (1, 0.2), "var": (1, 0.1), "pos_embed": (0, 1), "cls_token": (0, 1)}
    return filled(abstract, laws, clip=3)


@functools.cache
def init(model):
    return drawn(abstract_variables(model))


@functools.cache
def inference(model):
    return jax.jit(model.apply)


@functools.cache
def features(model):
    """A jitted function from variables, images, twins, key to what training fuses."""

    def run(variables, x, twins, key):
        rngs = {"dropout": key}
        return model.apply(variables, x, True, None, twins, rngs=rngs, method="forward_features")

    return jax.jit(run)


@functools.cache
def counted(**overrides):
    model = zoo.create_model("ahan_vit_b16", **overrides)
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_variables(model)["params"]))


D, BACKBONE = 768, 85_798_656
LINEAR = D**2 + D
BLOCK = 12 * D**2 + 13 * D
QUERIES = 64 + 16 + 4
TOKENS = 197
RESAMPLED = 4 * (8 * 14 * 14 + 8 * 8 * 14) * D
BLOCK_MACS = 12 * TOKENS * D**2 + 2 * TOKENS**2 * D
BACKBONE_MACS = 196 * D**2 + 12 * BLOCK_MACS


def fusion(streams: int, width: int = 512) -> int:
    return streams * D * width + width + 2 * width


def asymmetry(matrices: int) -> int:
    """MACs of FAAM: each half's tokens through every matrix, both directions of attention."""
    return matrices * 196 * D**2 + 2 * 2 * 98**2 * D


def part_macs(key_sets: int, query_matrices: int = 2) -> int:
    """MACs of HCA's attention: keys and values of all tokens for each set of projections, the rest for queries."""
    return key_sets * 2 * TOKENS * D**2 + 4 * QUERIES * (query_matrices * D**2 + 2 * TOKENS * D)


# Fields; parameters and MACs beside the backbone's; both as shares of the backbone's in percent.
LAYOUTS = {
    "recommended": ({}, 48 * LINEAR + 12 + 4 * LINEAR + fusion(6), part_macs(12) + asymmetry(4), (38.5, 21.6)),
    "HCA alone": (dict(faam=False), 48 * LINEAR + 12 + fusion(5), part_macs(12), (35.3, 18.8)),
    "FAAM alone": (dict(hca=False), 4 * LINEAR + fusion(2), asymmetry(4), (3.7, 2.8)),
    "neither": (dict(hca=False, faam=False), fusion(1), 0, (0.5, 0.0)),
    "no output projections": (
        dict(hca_layout="projections", faam_layout="projections", faam_shared=False, embedding_dim=768),
        36 * LINEAR + 12 + 6 * LINEAR + fusion(6, 768),
        part_macs(12, 1) + asymmetry(3),
        (33.0, 19.8),
    ),
    "a block for every region": (
        dict(hca_layout="block", hca_sharing="scales", faam=False),
        4 * BLOCK + 12 + fusion(5),
        part_macs(4, 10),
        (35.3, 17.2),
    ),
    "shared by scales": (
        dict(hca_sharing="scales", faam=False),
        16 * LINEAR + 12 + fusion(5),
        part_macs(4),
        (13.3, 8.2),
    ),
    "shared by regions": (
        dict(hca_sharing="regions", faam=False),
        12 * LINEAR + 12 + fusion(5),
        part_macs(3),
        (10.6, 6.9),
    ),
    "shared by all": (dict(hca_sharing="all", faam=False), 4 * LINEAR + 12 + fusion(5), part_macs(1), (5.0, 4.2)),
}


def test_names():
    assert zoo.list_models("ahan*") == ["ahan_nano", "ahan_vit_b16"]


def test_parameters_that_the_paper_reports():
    """33 % more are those of twelve cross-attentions, of a block for every region, and of others."""
    assert counted(hca=False, faam=False) - fusion(1) == BACKBONE
    twelve = counted() - counted(hca=False) - 4 * D * 512 - 12
    assert twelve == 48 * LINEAR == 28_348_416 and round(100 * twelve / BACKBONE, 1) == 33.0
    assert round(100 * (counted() - BACKBONE) / BACKBONE, 1) == 38.5
    assert round(100 * 4 * BLOCK / BACKBONE, 1) == 33.0


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_every_layout_costs(name):
    """Beside one block of the backbone's twelve, so that there is less to trace."""
    fields, parameters, macs, shares = LAYOUTS[name]
    model = zoo.create_model("ahan_vit_b16", depths=(1,), pair_layers=(1, 1), implementation="xla", **fields)
    variables = abstract_variables(model)
    streams = 1 + 4 * model.hca + model.faam
    macs += streams * D * model.embedding_dim + RESAMPLED * model.hca
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == BACKBONE - 11 * BLOCK + parameters
    counted = cost(model.apply, variables, **model.example_inputs()).matmul_flops // 2
    assert counted == BACKBONE_MACS - 11 * BLOCK_MACS + macs
    assert (round(100 * parameters / BACKBONE, 1), round(100 * macs / BACKBONE_MACS, 1)) == shares


class TestTwins:
    def test_leave_no_trace_in_inference(self):
        model, without = tiny(), tiny(pair_probability=0.0)
        variables = init(model)
        assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, init(without))
        assert cost(model.apply, variables, images()) == cost(without.apply, variables, images())
        expected = inference(without)(variables, images())
        np.testing.assert_array_equal(inference(model)(variables, images()), expected)
        with pytest.raises(ValueError, match=r"twin_index is for training \(train=True\) alone"):
            model.apply(variables, images(), twin_index=jnp.arange(3))

    def test_never_is_the_backbone(self):
        variables, twins, key = init(plain()), jnp.asarray([1, 0, -1]), jax.random.key(0)
        alone = features(plain())(variables, images(), None, key)
        np.testing.assert_array_equal(features(plain(pair_probability=0.0))(variables, images(), twins, key), alone)
        always = plain(pair_probability=1.0)
        paired = features(always)(variables, images(), twins, key)
        # One's own twin is the one in the mirror; who is without a twin, or whose twin is elsewhere, sees oneself.
        close(features(always)(variables, images(), jnp.arange(3), key), alone)
        close(features(always)(variables, images(), jnp.asarray([-1, 3, -7]), key), alone)
        assert (abs(paired - alone).max(1) > 1e-3).tolist() == [True, True, False]

    def test_are_seen_in_the_layers_that_have_them(self):
        model = plain(depths=(3,), pair_layers=(2, 3), pair_probability=1.0)
        variables, twins = init(model), jnp.asarray([1, 2, 0])
        attend = functools.partial(pairwise_attention, partner=twins)

        @jax.jit
        def last(variables):
            run = functools.partial(model.apply, variables, images(), method="forward_tokens")
            tokens = run(attend={1: attend, 2: attend})
            return tokens[-1][:, 0]

        norm = variables["params"]["head_norm"]
        class_token = last({"params": variables["params"]})
        centred = class_token - class_token.mean(-1, keepdims=True)
        expected = centred / np.sqrt(class_token.var(-1, keepdims=True) + 1e-6) * norm["scale"] + norm["bias"]
        close(features(model)(variables, images(), twins, jax.random.key(0)), expected)

    @pytest.mark.parametrize("coin", ("step", "image"))
    def test_the_coin(self, coin):
        """One for the batch: all or none; one for every image: some."""
        variables, twins = init(plain()), jnp.asarray([1, 0, 3, 2])
        x, key = images(4), jax.random.key(0)
        alone, paired = (np.asarray(features(plain(pair_probability=p))(variables, x, twins, key)) for p in (0.0, 1.0))
        run = features(plain(pair_coin=coin, pair_probability=0.5))
        thrown = []
        for seed in range(12):
            found = np.asarray(run(variables, x, twins, jax.random.key(seed)))
            is_paired = abs(found - paired).max(1) < 1e-5
            assert (is_paired | (abs(found - alone).max(1) < 1e-5)).all()
            thrown.append(is_paired)
        share = np.mean(thrown, axis=1)
        assert 0.2 < np.mean(thrown) < 0.8
        assert set(share) <= {0, 1} if coin == "step" else set(share) - {0, 1}

    @pytest.mark.parametrize("pair_gradient", (True, False))
    def test_gradients_through_the_twin(self, pair_gradient):
        model = plain(pair_probability=1.0, pair_gradient=pair_gradient)

        @jax.jit
        def gradient(x):
            run = functools.partial(model.apply, init(plain()), rngs={"dropout": jax.random.key(0)})
            twins = jnp.asarray([1, -1, -1])
            return jax.grad(lambda x: run(x, True, None, twins, method="forward_features")[0].sum())(x)

        moved = np.asarray(gradient(images())).any((1, 2, 3))
        assert moved.tolist() == [True, pair_gradient, False]


def streams(**overrides):
    fields = dict(
        regions=4, scales=(1, 2, 4), cells=4, sampling_ratio=2, num_heads=2, sharing="none", layout="attention"
    )
    return HierarchicalCrossAttention(**{**fields, **overrides})


def operands():
    grid = normal(2, 6, 6, 8, seed=2)
    tokens = jnp.concatenate([normal(2, 1, 8, seed=3), grid.reshape(2, 36, 8)], axis=1)
    return grid, tokens, jnp.asarray(np.stack([BOXES, BOXES * 0.9]))


def init_streams(module):
    return drawn(jax.eval_shape(module.init, jax.random.key(0), *operands()))


def by_hand(params, grid, tokens, boxes, layout):
    """One region at one scale after the other in float64 numpy."""
    as64 = functools.partial(np.asarray, dtype=np.float64)
    cut = roi_align(grid, boxes, (4, 4), 2)
    tokens, logits = as64(tokens), as64(params["scale_logits"])
    out = []
    for region in range(4):
        mixing = np.exp(logits[region]) / np.exp(logits[region]).sum()
        total = 0
        for share, scale in zip(mixing, (1, 2, 4)):
            own = {name: {k: as64(v)[region] for k, v in leaf.items()} for name, leaf in params[f"x{scale}"].items()}

            def linear(name, x, own=own):
                return x @ own[name]["kernel"] + own[name]["bias"]

            def norm(name, x, own=own):
                x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
                return x * own[name]["scale"] + own[name]["bias"] if name in own else x

            parts = as64(pool_parts(cut, scale))[:, region]
            query, key, value = linear("query", norm("norm1", parts)), linear("key", tokens), linear("value", tokens)
            found = []
            for head in (slice(0, 4), slice(4, 8)):
                scores = np.exp(query[..., head] @ key[..., head].swapaxes(1, 2) / 2)
                found.append(scores / scores.sum(-1, keepdims=True) @ value[..., head])
            answer = np.concatenate(found, axis=-1)
            if layout != "projections":
                answer = linear("proj", answer)
            if layout == "block":
                answer = answer + parts
                hidden = linear("fc1", norm("norm2", answer))
                answer = answer + linear("fc2", as64(jax.nn.gelu(jnp.asarray(hidden), approximate=False)))
            total = total + share * answer.mean(1)
        out.append(total)
    return np.concatenate(out, axis=-1)


class TestParts:
    @pytest.mark.parametrize("layout", ("attention", "projections", "block"))
    def test_against_a_loop(self, layout):
        module = streams(layout=layout)
        variables = init_streams(module)
        out = jax.jit(module.apply)(variables, *operands())
        close(out, by_hand(variables["params"], *operands(), layout), rtol=1e-4)

    @pytest.mark.parametrize("sharing", ("scales", "regions", "all"))
    def test_sharing_is_to_have_the_same_projections(self, sharing):
        module = streams(sharing=sharing)
        variables = init_streams(module)
        params = variables["params"]
        each = {"scale_logits": params["scale_logits"]}
        for scale in (1, 2, 4):
            shared = params["scales" if sharing in ("scales", "all") else f"x{scale}"]
            each[f"x{scale}"] = jax.tree.map(lambda x: jnp.broadcast_to(x, (4, *x.shape[1:])), shared)
        out = jax.jit(module.apply)(variables, *operands())
        close(out, jax.jit(streams().apply)({"params": each}, *operands()))

    def test_scale_weights(self):
        """They start equal; one alone leaves the other scales out."""
        module = streams()
        started = jax.jit(module.init)(jax.random.key(0), *operands())["params"]["scale_logits"]
        np.testing.assert_array_equal(started, np.zeros((4, 3)))
        params = init_streams(module)["params"]
        apply = jax.jit(module.apply)
        only = [
            apply(
                {"params": params | {"scale_logits": jnp.where(jnp.arange(3) == i, 0.0, -jnp.inf * jnp.ones((4, 3)))}},
                *operands(),
            )
            for i in range(3)
        ]
        uniform = apply({"params": params | {"scale_logits": started}}, *operands())
        close(uniform, np.mean(only, axis=0))
        changed = {**params, "x2": jax.tree.map(jnp.zeros_like, params["x2"])}
        logits = jnp.where(jnp.arange(3) == 2, 0.0, -jnp.inf * jnp.ones((4, 3)))
        np.testing.assert_array_equal(apply({"params": changed | {"scale_logits": logits}}, *operands()), only[2])

    def test_map(self):
        module = streams()
        variables = init_streams(module)
        watch = jax.jit(functools.partial(module.apply, mutable=["attention"]))
        out, sown = watch(variables, *operands())
        close(out, jax.jit(module.apply)(variables, *operands()))
        (found,) = sown["attention"]["map"]
        assert found.shape == (6, 6) and found.weights.shape == (2, 4, 3, 6, 6)
        close(found.mixing.sum(-1), 1)
        patches = found.weights.sum((3, 4))
        assert (patches < 1).all() and (patches > 0.8).all()
        # Without the class token among what is looked at nothing is lost.
        grid, tokens, boxes = operands()
        _, sown = watch(variables, grid, tokens[:, 1:], boxes)
        (found,) = sown["attention"]["map"]
        close(found.weights.sum((3, 4)), 1)
        close(found.heat(1, 2), found.weights[:, 1, 2])
        close(found.heat(3), np.einsum("s,bshw->bhw", found.mixing[3], found.weights[:, 3]))


class TestAsymmetry:
    @pytest.mark.parametrize("layout", ("attention", "projections"))
    @pytest.mark.parametrize("shared", (True, False))
    def test_mirror_images(self, shared, layout):
        module = FacialAsymmetry(num_heads=2, shared=shared, layout=layout)
        grid = normal(2, 3, 6, 8)
        variables = drawn(jax.eval_shape(module.init, jax.random.key(0), grid))
        apply = jax.jit(module.apply)
        symmetric = jnp.concatenate([grid[:, :, :3], grid[:, :, 2::-1]], axis=2)
        signature = apply(variables, symmetric)
        assert signature.shape == (2, 8) and (np.asarray(signature) == 0).all() == shared
        mirrored = np.array_equal(apply(variables, grid), apply(variables, grid[:, :, ::-1]))
        assert mirrored == shared

    def test_both_directions_have_their_own(self):
        """Where the own ones are alike, they are shared ones."""
        grid, shared = normal(2, 3, 6, 8), FacialAsymmetry(num_heads=2)
        params = drawn(jax.eval_shape(shared.init, jax.random.key(0), grid))["params"]
        own = {f"{name}_{side}": leaf for name, leaf in params.items() for side in ("left", "right")}
        expected = shared.apply({"params": params}, grid)
        close(FacialAsymmetry(num_heads=2, shared=False).apply({"params": own}, grid), expected)
        # The left half asks with what is called left, of keys and values that are called left.
        moved = own | {"proj_right": jax.tree.map(jnp.zeros_like, params["proj"])}
        left = abs(FacialAsymmetry(num_heads=2, shared=False).apply({"params": moved}, grid))
        stopped = moved | {"query_right": params["query"], "key_right": jax.tree.map(lambda x: 7 * x, params["key"])}
        np.testing.assert_array_equal(FacialAsymmetry(num_heads=2, shared=False).apply({"params": stopped}, grid), left)

    def test_map(self):
        grid, module = normal(2, 3, 6, 8), FacialAsymmetry(num_heads=2)
        variables = drawn(jax.eval_shape(module.init, jax.random.key(0), grid))
        signature, sown = module.apply(variables, grid, mutable=["attention"])
        (found,) = sown["attention"]["map"]
        close(found.difference.mean((1, 2)), signature.mean(1))
        heat = found.heat()
        assert heat.shape == (2, 3, 6)
        np.testing.assert_array_equal(heat, heat[:, :, ::-1])

    def test_an_odd_number_of_columns(self):
        with pytest.raises(ValueError, match="multiples of 4 pixels; got 8x6, the nearest that fits is 8x4"):
            tiny(image_size=(8, 6))
        assert tiny(image_size=(8, 6), faam=False).grid == (4, 3)
        assert tiny(image_size=(6, 8)).grid == (3, 4)


class TestBoxes:
    def test_canonical_ones_are_the_default(self):
        variables, x = init(coarse()), images()
        embed = jax.jit(functools.partial(coarse().apply, method="embed"))
        expected = embed(variables, x)
        close(embed(variables, x, boxes=jnp.asarray(BOXES[None])), expected)
        close(embed(variables, x, boxes=jnp.asarray(np.stack([BOXES] * 3))), expected)
        moved = jnp.asarray(np.stack([BOXES, BOXES * 0.5, BOXES]))
        assert (abs(embed(variables, x, boxes=moved) - expected).max(1) > 1e-4).tolist() == [False, True, False]

    def test_mirrored(self):
        """Those of an aligned face are their own mirror image."""
        assert len(REGIONS) == len(CANONICAL_BOXES)
        close(mirror_boxes(BOXES), BOXES, atol=1e-6)
        np.testing.assert_allclose(mirror_boxes(np.asarray([0.1, 0.2, 0.4, 0.9])), [0.6, 0.2, 0.9, 0.9])
        check_boxes(BOXES[None])

    @pytest.mark.parametrize(
        ("place", "box", "words"),
        [
            (1, (0.2, 0.2, 1.2, 0.5), "boxes of image 2, nose: .* got"),
            (0, (0.5, 0.2, 0.5, 0.4), "boxes of image 2, eyes"),
            (3, (0.2, 0.6, 0.5, 0.4), "boxes of image 2, jaw"),
            (2, (-0.1, 0.2, 0.5, 0.4), "boxes of image 2, mouth"),
            (2, (np.nan, 0.2, 0.5, 0.4), "must be from 0 to 1 with left < right and top < bottom"),
        ],
    )
    def test_that_are_none(self, place, box, words):
        boxes = np.stack([BOXES] * 3)
        boxes[2, place] = box
        with pytest.raises(ValueError, match=words):
            tiny().apply(init(tiny()), images(), boxes=jnp.asarray(boxes))

    def test_of_another_number(self):
        with pytest.raises(ValueError, match=r"boxes must be \(batch, 4, 4\), got \(3, 3, 4\)"):
            check_boxes(np.stack([BOXES[:3]] * 3))
        with pytest.raises(ValueError, match="boxes are for 2 images, there are 3"):
            AHAN._boxes(tiny(), jnp.asarray(np.stack([BOXES] * 2)), 3)

    def test_outside_when_nobody_can_look(self):
        """Traced boxes are not checked: what is outside is empty."""
        boxes = jnp.asarray(np.stack([BOXES, BOXES + 3, -BOXES]))
        gradient = jax.jit(jax.grad(lambda b: jnp.square(coarse().apply(init(coarse()), images(), boxes=b)).sum()))
        assert np.isfinite(gradient(boxes)).all()


def test_embeddings_and_identities():
    model, variables = plain(), init(plain())
    embedding = jax.jit(functools.partial(model.apply, method="embed"))(variables, images())
    assert embedding.shape == (3, 8)
    kernel = np.asarray(variables["params"]["identities"]["kernel"], np.float64)
    unit = np.asarray(embedding, np.float64) / np.linalg.norm(embedding, axis=1, keepdims=True)
    expected = 64 * unit @ (kernel / np.linalg.norm(kernel, axis=0))
    logits = inference(model)(variables, images())
    close(logits, expected, rtol=1e-4)
    assert abs(logits).max() <= 64
    headless = plain(num_classes=0)
    assert "identities" not in init(headless)["params"]
    close(inference(headless)(variables, images()), embedding)
    # The embedding of a batch norm that multiplies by zero is no direction.
    zero = variables["params"] | {"fusion_norm": jax.tree.map(jnp.zeros_like, variables["params"]["fusion_norm"])}

    @jax.jit
    def gradient(params):
        return jax.grad(lambda p: model.apply({**variables, "params": p}, images()).sum())(params)

    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient(zero)))


def test_training_with_one_image():
    """A batch norm of one image has no variance; nothing divides by it."""
    model = plain()
    run = functools.partial(model.apply, train=True, mutable=["batch_stats"], method="embed")

    @jax.jit
    def gradient(variables):
        def loss(params):
            return jnp.square(run({**variables, "params": params}, images(1))[0]).sum()

        return jax.value_and_grad(loss)(variables["params"])

    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient(init(model))))


def test_gradients_reach_every_parameter():
    model, variables, twins = tiny(), init(tiny()), jnp.asarray([1, 0, -1])

    @jax.jit
    def gradient(params):
        run = functools.partial(model.apply, mutable=["batch_stats"], rngs={"dropout": jax.random.key(3)})
        return jax.grad(lambda p: (run({**variables, "params": p}, images(), True, None, twins)[0][:, 1] ** 2).sum())(
            params
        )

    for path, leaf in flatten(gradient(variables["params"])).items():
        # Both halves have the same bias, which their difference does not see; the batch norm takes the mean.
        unseen = path in ("asymmetry/proj/bias", "fusion/bias")
        assert np.isfinite(leaf).all() and (unseen or np.asarray(leaf).any()), path


def test_without_streams_it_is_the_backbone():
    model = plain()
    vit = zoo.create_model("vit_nano", image_size=8, patch=2, dim=16, num_heads=2, depths=(2,), num_classes=5)
    weights = drawn(abstract_variables(vit))
    variables = with_backbone(init(model), weights)
    expected = jax.jit(vit.clone(num_classes=0).apply)(weights, images())
    found = jax.jit(functools.partial(model.apply, method="forward_features"))(variables, images())
    close(found, expected)
    whole = with_backbone(init(coarse()), weights)
    close(jax.jit(functools.partial(coarse().apply, method="forward_features"))(whole, images())[:, :16], expected)


@pytest.mark.parametrize(
    "fields",
    [dict(stream_stage=0, depths=(1, 1)), dict(stream_norm=False), dict(hca_class_token=False), dict(cross_heads=1)],
    ids=str,
)
def test_choices_that_change_the_streams_alone(fields):
    def run(variables, **fields):
        model = coarse(**fields)
        return jax.jit(functools.partial(model.apply, method="forward_features"))(variables, images())

    variables = init(coarse())
    expected = run(variables)
    if "depths" in fields:
        names = {"stages_0_1": "stages_1_0"}
        variables = {**variables, "params": {names.get(k, k): v for k, v in variables["params"].items()}}
    found = run(variables, **fields)
    close(found[:, :16], expected[:, :16])
    assert abs(found[:, 16:] - expected[:, 16:]).max() > 1e-3


def test_attention_maps():
    maps = zoo.attention_maps(tiny(), init(tiny()), images())
    assert list(maps) == [*(f"stages_0_{i}/attention" for i in range(2)), "parts", "asymmetry"]
    np.testing.assert_array_equal(maps["parts"].boxes, np.stack([BOXES] * 3))


def test_bfloat16_is_near_float32():
    expected = inference(tiny())(init(tiny()), images())
    logits = inference(tiny(dtype=jnp.bfloat16))(init(tiny()), images())
    assert logits.dtype == jnp.bfloat16
    np.testing.assert_allclose(logits.astype(jnp.float32), expected, atol=1)


def test_rematerialization_takes_twins():
    def gradient(remat):
        model = plain(pair_probability=1.0, remat=remat)
        run = features(model)
        return jax.grad(lambda v: jnp.square(run(v, x, twins, jax.random.key(0))).sum())

    x, twins = images(), jnp.asarray([1, 0, 2])
    variables = init(plain(pair_probability=1.0))
    programs = [str(jax.make_jaxpr(gradient(remat))(variables)) for remat in ("full", "none")]
    assert ["remat" in program for program in programs] == [True, False]
    chex.assert_trees_all_close(gradient("full")(variables), gradient("none")(variables), rtol=1e-4, atol=1e-4)


def test_features_only():
    model = tiny(features_only=True)
    assert not {"parts", "asymmetry", "fusion"} & set(abstract_variables(model)["params"])
    (found,) = jax.eval_shape(model.apply, abstract_variables(model), images())
    assert found.shape == (3, 4, 4, 16)


def test_layers():
    layer_of, last = registry.family_of("ahan_nano").layers(zoo.create_model("ahan_nano"))
    paths = ("stem/cls_token", "stages_0_3/norm1/scale", "parts/x1/query/kernel", "asymmetry/proj/bias", "fusion/bias")
    assert [layer_of(path) for path in paths] == [0, 4, 5, 5, 5] and last == 5


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (dict(distilled=True), "distilled must be False"),
        (dict(hca_sharing="scale"), "unknown hca_sharing 'scale'; did you mean 'scales'"),
        (dict(faam_layout="block"), "unknown faam_layout 'block'"),
        (dict(pair_coin="batch"), "unknown pair_coin 'batch'"),
        (dict(scales=(1, 3)), "scales must divide region_cells=4, got 3"),
        (dict(cross_heads=3), "cross_heads must divide dim=16 or be None, got 3"),
        (dict(pair_probability=1.5), "pair_probability must be from 0 to 1, got 1.5"),
        (dict(scales=()), "scales must name at least one"),
        (dict(region_cells=0), "region_cells must be at least 1, got 0"),
        (dict(pair_layers=(2, 4)), r"of the layers 1 to 2, got \(2, 4\)"),
        (dict(stream_stage=1), "stream_stage must be one of 1 stages, got 1"),
    ],
)
def test_errors(overrides, words):
    with pytest.raises(ValueError, match=words):
        tiny(**overrides)
