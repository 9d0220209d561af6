"""DCAL: what its branches have in common and what not, its costs in closed form, both ways of inference."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from kernels.cost import cost
from kernels.cross import attention_rollout
from tests.variables import filled
from train import tasks
from zoo import registry
from zoo.backbone import with_backbone
from zoo.dcal import dynamic_loss
from zoo.errors import WeightsError
from zoo.keymap import flatten
from zoo.pretrained import abstract_variables
from zoo.vit_blocks import Block

# 16 patches, of which 4 ask.
TINY = dict(dim=16, num_heads=2, depths=(2,), num_classes=5, in_chans=1)
KEY = {"dropout": jax.random.key(7)}
close = functools.partial(np.testing.assert_allclose, atol=1e-5)


def tiny(**overrides):
    return zoo.create_model("dcal_nano", **{**TINY, **overrides})


@functools.cache
def images(batch: int = 3):
    return jnp.asarray(np.random.default_rng(0).standard_normal((batch, 8, 8, 1), np.float32))


@functools.cache
def init(model):
    laws = {"kernel": (0, 0.3), "scale": (1, 0.2), "pos_embed": (0, 1), "cls_token": (0, 1)}
    return filled(abstract_variables(model), laws)


@functools.cache
def training(model):
    """A jitted function from variables, images, partners to the logits of all branches."""
    return jax.jit(lambda variables, x, partner: model.apply(variables, x, True, partner, rngs=KEY))


@functools.cache
def inference(model):
    return jax.jit(model.apply)


def parameters(model) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_variables(model)["params"]))


def test_names():
    assert zoo.list_models("dcal*") == [
        *("dcal_deit_base", "dcal_deit_small", "dcal_deit_tiny", "dcal_nano", "dcal_vit_base")
    ]


@pytest.mark.parametrize("name, dim, share", [("vit_base", 768, 0.083), ("deit_tiny", 192, 0.081)])
def test_parameters_are_those_of_one_block_more(name, dim, share):
    """The paper reports 8 % more for ViT-B and 9 % for DeiT-T."""
    backbone = parameters(zoo.create_model(f"{name}_patch16_224", num_classes=0))
    added = parameters(zoo.create_model(f"dcal_{name}", num_classes=0, image_size=224)) - backbone
    block, norm = 12 * dim**2 + 13 * dim, 2 * dim
    assert added == block + norm
    assert added / backbone == pytest.approx(share, abs=5e-4)
    with_classes = parameters(zoo.create_model(f"dcal_{name}", num_classes=200, image_size=224))
    assert with_classes == backbone + added + 2 * (200 * dim + 200) + 3


@pytest.mark.parametrize("size, ratio, share", [(448, 0.1, 0.0190), (224, 0.3, 0.0341)])
def test_macs_of_global_local_attention(size, ratio, share):
    """Keys and values of all tokens, all else of the selected ones: the paper reports 2 to 3 %."""
    model = zoo.create_model("dcal_vit_base", image_size=size, ratio=ratio, num_classes=0, implementation="xla")
    macs = cost(model.apply, abstract_variables(model), **model.example_inputs()).matmul_flops // 2
    patches, dim = (size // 16) ** 2, 768
    tokens, asking = patches + 1, 1 + int(ratio * patches)
    backbone = patches * dim**2 + 12 * (12 * tokens * dim**2 + 2 * tokens**2 * dim)
    rollout = 12 * tokens**2
    added = 2 * tokens * dim**2 + (2 + 8) * asking * dim**2 + 2 * asking * tokens * dim + rollout
    assert macs == backbone + added
    assert added / backbone == pytest.approx(share, abs=5e-5)


def test_pair_wise_attention_leaves_no_trace_in_inference():
    model, plain = tiny(), tiny(pwca=False)
    variables, without = (abstract_variables(m) for m in (model, plain))
    weights = [tree["params"].pop("loss_weights").shape for tree in (variables, without)]
    assert weights == [(3,), (2,)]
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, without)
    costs = [cost(m.apply, abstract_variables(m), images()) for m in (model, plain)]
    assert costs[0] == costs[1]
    params = {**init(model)["params"], "loss_weights": jnp.zeros(2)}
    expected = inference(plain)({"params": params}, images())
    np.testing.assert_array_equal(inference(model)(init(model), images()), expected)


def test_branches_in_training():
    model, x = tiny(), images()
    variables = init(model)
    sa, glca, alone = training(model)(variables, x, jnp.asarray([-1, 3, -1]))
    assert sa.shape == glca.shape == alone.shape == (3, 5)
    # Without a partner, and with itself for one, an image is what it is in self-attention.
    close(alone, sa)
    close(training(model)(variables, x, jnp.arange(3))[2], sa)
    paired = training(model)(variables, x, jnp.asarray([1, 0, 2]))
    np.testing.assert_array_equal(paired[:2], (sa, glca))
    assert (abs(paired[2] - sa).max(1) > 1e-3).tolist() == [True, True, False]


def test_partners_are_a_permutation_of_the_batch():
    model, variables = tiny(), init(tiny())
    drawn = jax.jit(lambda key: model.apply(variables, images(), True, rngs={"dropout": key})[2])
    permutations = list(itertools.permutations(range(3)))
    logits = np.stack([training(model)(variables, images(), jnp.asarray(p))[2] for p in permutations])
    seen = set()
    for seed in range(8):
        distances = abs(logits - np.asarray(drawn(jax.random.key(seed)))).max((1, 2))
        assert distances.min() < 1e-5
        seen.add(int(distances.argmin()))
    assert len(seen) > 2


def test_gradients_reach_every_parameter():
    model, variables = tiny(), init(tiny())

    @jax.jit
    def gradient(params):
        def loss(params):
            logits = model.apply({"params": params}, images(), True, rngs=KEY)
            return dynamic_loss([jnp.square(branch).mean() for branch in logits], params["loss_weights"])

        return jax.grad(loss)(params)

    for path, leaf in flatten(gradient(variables["params"])).items():
        assert np.isfinite(leaf).all() and np.asarray(leaf).any(), path


def test_all_patches_asking_are_a_plain_block():
    model = tiny(ratio=1.0)
    variables = init(model)
    tokens, weights = jax.jit(lambda v: model.apply(v, images(), return_weights=True, method="forward_tokens"))(
        variables
    )
    features = jax.jit(functools.partial(model.apply, method="forward_features"))(variables, images())
    block = Block(num_heads=2, grid=(4, 4))
    plain = block.apply({"params": variables["params"]["global_local"]["block"]}, tokens[-1], False)
    close(features[:, 1], plain[:, 0])
    close(features[:, 0], tokens[-1][:, 0])
    # As `glca_token` says: with fewer patches the class token gets the same answer, it asks for itself.
    some = jax.jit(functools.partial(tiny().apply, method="forward_features"))(variables, images())
    close(some, features)
    maps = zoo.attention_maps(tiny(), variables, images())
    scores = attention_rollout(weights)[:, 0, 1:]
    found = maps["global_local"]
    close(found.scores.reshape(3, 16), scores)
    np.testing.assert_array_equal(found.selected, np.argsort(-np.asarray(scores), axis=1)[:, :4])
    np.testing.assert_array_equal(found.places() @ [4, 1], found.selected)


def test_the_mean_of_those_that_asked():
    """With it the selection counts: it is the mean over the rows of a plain block that were selected."""
    model = tiny(glca_token="mean")
    variables = init(model)
    features, tokens = jax.jit(
        lambda v: (
            model.apply(v, images(), method="forward_features"),
            model.apply(v, images(), method="forward_tokens")[-1],
        )
    )(variables)
    block = Block(num_heads=2, grid=(4, 4))
    plain = block.apply({"params": variables["params"]["global_local"]["block"]}, tokens, False)
    chosen = zoo.attention_maps(model, variables, images())["global_local"].selected
    rows = np.concatenate([np.zeros((3, 1), int), 1 + np.asarray(chosen)], 1)
    close(features[:, 1], np.take_along_axis(np.asarray(plain), rows[..., None], 1).mean(1))
    with pytest.raises(ValueError, match="unknown glca_token 'all'"):
        tiny(glca_token="all")


def test_training_moves_the_weights_of_the_losses():
    """The task's loss is the dynamic one of its branches, whose weights learn with the model."""
    model, variables = tiny(), init(tiny())
    task = tasks.Classify(num_classes=5, mean=(0.0,), std=(1.0,))
    batch = {"image": images(), "target": jax.nn.one_hot(jnp.arange(3), 5), "label": jnp.arange(3)}

    @jax.jit
    def run(params):
        return jax.value_and_grad(lambda p: task.loss(model, {"params": p}, batch, KEY["dropout"])[0])(params)

    loss, gradient = run(variables["params"])
    branches = jax.jit(lambda v: model.apply(v, images(), True, rngs=KEY))(variables)
    losses = [-(jax.nn.log_softmax(branch) * batch["target"]).sum(1).mean() for branch in branches]
    weights = variables["params"]["loss_weights"]
    close(loss, 0.5 * sum(np.exp(-w) * each + w for w, each in zip(weights, losses)))
    close(gradient["loss_weights"], [0.5 * (1 - np.exp(-w) * each) for w, each in zip(weights, losses)])


def test_two_rules_of_inference():
    model, variables = tiny(), init(tiny())
    sa, glca, _ = (np.asarray(jax.nn.softmax(x)) for x in training(model)(variables, images(), jnp.arange(3)))
    logits = inference(model)(variables, images())
    close(jax.nn.softmax(logits), (sa + glca) / 2)
    tokens = inference(tiny(inference="tokens"))(variables, images())
    assert tokens.shape == (3, 32)
    params = variables["params"]
    for half, name, expected in ((tokens[:, :16], "head", sa), (tokens[:, 16:], "glca_head", glca)):
        close(jax.nn.softmax(half @ params[name]["kernel"] + params[name]["bias"]), expected)
    headless = tiny(num_classes=0)
    assert not {"head", "glca_head", "loss_weights"} & set(abstract_variables(headless)["params"])
    np.testing.assert_array_equal(inference(headless)(variables, images()), tokens)


def test_the_dynamic_loss():
    losses, weights = jnp.asarray([0.7, 1.9, 0.2]), jnp.asarray([0.3, -0.4, 0.0])
    value, gradient = jax.value_and_grad(lambda w: dynamic_loss(list(losses), w))(weights)
    close(value, 0.5 * (np.exp(-weights) * losses + weights).sum())
    close(gradient, 0.5 * (1 - np.exp(-weights) * losses))
    close(jax.grad(lambda w: dynamic_loss(list(losses), w))(jnp.log(losses)), 0)
    with pytest.raises(ValueError, match="losses are 2, weights are for 3 branches"):
        dynamic_loss(list(losses[:2]), weights)
    np.testing.assert_array_equal(jax.jit(tiny().init)(jax.random.key(0), images())["params"]["loss_weights"], 0)


def test_a_branch_less():
    """With GLCA alone and PWCA alone, as in the paper's ablation."""
    x = images()
    assert len(training(tiny(pwca=False))(init(tiny(pwca=False)), x, None)) == 2
    model = tiny(glca=False)
    variables = init(model)
    assert not [name for name in variables["params"] if "glca" in name or "global" in name]
    sa, _ = training(model)(variables, x, jnp.arange(3))
    np.testing.assert_allclose(jax.nn.softmax(inference(model)(variables, x)), jax.nn.softmax(sa), atol=1e-6)


def test_remat_and_bfloat16():
    variables, partner = init(tiny()), jnp.asarray([1, 2, 0])
    expected = training(tiny())(variables, images(), partner)

    def gradient(model):
        return jax.grad(lambda v: sum(map(jnp.sum, model.apply(v, images(), True, partner, rngs=KEY))))

    assert "remat" in str(jax.make_jaxpr(gradient(tiny(remat="full")))(variables))
    jax.tree.map(close, training(tiny(remat="full"))(variables, images(), partner), expected)
    for half, whole in zip(training(tiny(dtype=jnp.bfloat16))(variables, images(), partner), expected):
        assert half.dtype == jnp.bfloat16
        np.testing.assert_allclose(half.astype(jnp.float32), whole, atol=0.06 * float(abs(whole).max()))


def test_the_backbone_comes_from_a_vit():
    vit = zoo.create_model("vit_nano", **TINY)
    loaded = with_backbone(init(tiny()), init(vit))
    params = loaded["params"]
    assert params.keys() == init(tiny())["params"].keys()
    for name in ("stem", "stages_0_0", "stages_0_1", "head_norm"):
        jax.tree.map(np.testing.assert_array_equal, params[name], init(vit)["params"][name])
    np.testing.assert_array_equal(params["head"]["kernel"], init(tiny())["params"]["head"]["kernel"])
    shallow = zoo.create_model("vit_nano", **{**TINY, "depths": (1,)})
    with pytest.raises(WeightsError, match="missing"):
        with_backbone(init(tiny()), init(shallow))
    with pytest.raises(WeightsError, match="misshapen"):
        with_backbone(init(tiny()), init(zoo.create_model("vit_nano", **{**TINY, "in_chans": 3})))


def test_layers():
    layer_of, last = registry.family_of("dcal_nano").layers(zoo.create_model("dcal_nano"))
    paths = ("stem/cls_token", "stages_0_2/norm1/scale", "global_local/block/norm1/scale", "loss_weights")
    assert [layer_of(path) for path in paths] == [0, 3, 4, 4] and last == 4


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (dict(distilled=True), "distilled must be False"),
        (dict(ratio=0.0), "ratio must be above 0 and at most 1, got 0.0"),
        (dict(inference="token"), "unknown inference 'token'; did you mean 'tokens'"),
        (dict(head_fusion="maximum"), "unknown head_fusion 'maximum'"),
    ],
)
def test_errors(overrides, words):
    with pytest.raises(ValueError, match=words):
        tiny(**overrides)


def test_partners_are_for_training():
    with pytest.raises(ValueError, match="partner is for training"):
        tiny().apply(init(tiny()), images(), partner=jnp.arange(3))
