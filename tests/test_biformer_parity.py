"""BiFormer against the authors' code in float64, see `reference/make_biformer.py`."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import zoo
from tests.parity import assert_features, assert_gradients, assert_near, part, reference
from tests.reference.weights import pseudo_images, pseudo_normal, sample
from zoo.biformer_attention import RoutedAttention
from zoo.keymap import check_key_map, flatten
from zoo.registry import family_of
from zoo.transforms import conv, linear, pointwise
from zoo.watch import DenseMap, RoutedMap

# Reached in float32: logits, of standard deviation 5, within 1e-5, features and gradients within 2e-6.
OUTPUT_TOLERANCE, GRADIENT_TOLERANCE, FLOAT64_TOLERANCE = 2e-5, 2e-5, 1e-9
# Regions may be chosen differently where the reference's last choice is no better than the next by more than this.
LEAST_GAP = 1e-5
# Less than half the time to compile; the programs run once.
QUICK = {"xla_backend_optimization_level": "0"}

SHORT = dict(depths=(1, 1, 2, 1), dims=(32, 64, 128, 256), num_classes=10)
MODELS = {
    "auto_pad": ("biformer_tiny", dict(auto_pad=True)),
    "codes": (
        "biformer_tiny",
        dict(
            topks=(0, 4, -1, -2),
            kv_downsample_mode="ada_avgpool",
            kv_per_wins=(2, 2, 2, 2),
            soft_routing=True,
            diff_routing=True,
            param_routing=True,
        ),
    ),
    "stl": ("biformer_stl", {}),
    "stl_nchw": ("biformer_stl_nchw", {}),
}
SIZES = {
    "auto_pad": ("64x64", "225x257", "5x6"),
    "codes": ("224x112",),
    "stl": ("112x112",),
    "stl_nchw": ("157x120", "112x112"),
}
MODULES = {
    "identity": {},
    "ada_avgpool": dict(kv_downsample_mode="ada_avgpool", kv_per_win=4),
    "ada_maxpool": dict(kv_downsample_mode="ada_maxpool", kv_per_win=4),
    "avgpool": dict(kv_downsample_mode="avgpool", kv_downsample_ratio=2),
    "maxpool": dict(kv_downsample_mode="maxpool", kv_downsample_ratio=2),
    "soft": dict(soft_routing=True),
    "soft_diff": dict(soft_routing=True, diff_routing=True),
    "soft_diff_param": dict(soft_routing=True, diff_routing=True, param_routing=True),
    "all_regions": dict(topk=49),
    "auto_pad": dict(auto_pad=True),
    "nchw": dict(code="nchw"),
    "nchw_ragged": dict(code="nchw"),
}


@functools.cache
def program(model, with_gradients: bool):
    """From variables and images to the gradients of sum(logits * direction), and logits, features, attention maps."""

    def run(params, batch_stats, images):
        variables = {"params": params, "batch_stats": batch_stats}
        method = "forward_intermediates"
        features, state = model.apply(variables, images, method=method, mutable=["attention"])
        logits = model.apply(variables, features[-1], method="forward_head")
        direction = pseudo_normal("direction", logits.shape).astype(logits.dtype)
        return (logits * direction).sum(), (logits, features, state["attention"])

    function = jax.grad(run, has_aux=True) if with_gradients else lambda *inputs: (None, run(*inputs)[1])
    return jax.jit(function, compiler_options=QUICK)


def maps(state):
    return jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, RoutedMap | DenseMap))


def assert_routes(indices, record: dict[str, np.ndarray]):
    """The same regions chosen wherever the reference's choice is clear."""
    expected = part(record, "routes")
    assert len(indices) == sum(key.endswith("/chosen") for key in expected)
    compared = 0
    for block, found in enumerate(indices):
        clear = expected[f"{block}/gap"] > LEAST_GAP
        chosen = expected[f"{block}/chosen"]
        assert found.shape == chosen.shape
        np.testing.assert_array_equal(np.sort(found, axis=-1)[clear], chosen[clear], err_msg=f"routed block {block}")
        compared += clear.sum()
    assert compared


def check(model, variables, record, x64: bool, path=None):
    """One size of one model: everything that its record has, gradients by way of a file at `path`."""
    dtype, tolerance = (np.float64, FLOAT64_TOLERANCE) if x64 else (np.float32, OUTPUT_TOLERANCE)
    # Statistics are float32 whatever the dtype of the parameters.
    variables = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), variables)
    images = pseudo_images(record["image_shape"], int(record["seed"])).astype(dtype)
    with jax.default_matmul_precision("highest"):
        run = program(model, with_gradients=path is not None)
        gradients, (logits, features, state) = run(variables["params"], variables["batch_stats"], images)
    assert logits.dtype == dtype
    np.testing.assert_allclose(logits, record["logits"], rtol=0, atol=tolerance)
    assert_features(features, record, tolerance)
    routed = [leaf for leaf in maps(state) if isinstance(leaf, RoutedMap)]
    assert_routes([leaf.indices for leaf in routed], record)
    for leaf in maps(state):
        np.testing.assert_allclose(leaf.weights.sum(-1), 1, atol=1e-5)
    if path is not None:
        # Gradients are shaped like the parameters, so saving them gives every one its reference name.
        zoo.save_pretrained(model, {"params": gradients, "batch_stats": variables["batch_stats"]}, path)
        named = {name: value for name, value in load_file(path).items() if ".running_" not in name}
        assert_gradients(named, record, tolerance if x64 else GRADIENT_TOLERANCE)


def at_size(record, size: str):
    return {**part(record, f"{size}/"), "image_shape": (1, *map(int, size.split("x")), 3)}


@functools.cache
def tiny():
    record, weights = reference("biformer_tiny_official")
    return record, weights, *zoo.load_pretrained("biformer_tiny", weights)


@pytest.mark.slow
@pytest.mark.parametrize("size", ("224x224", "224x448"))
def test_tiny(size):
    record, _, model, variables, _ = tiny()
    check(model, variables, at_size(record, size), x64=False)


@pytest.mark.slow
def test_gradients_of_tiny(tmp_path):
    record, _, model, variables, _ = tiny()
    check(model, variables, at_size(record, "224x224"), x64=False, path=tmp_path / "gradients.safetensors")


def cases(*quick):
    """Every short model, size and whether gradients are taken, all but `quick` marked slow."""
    every = [(name, size, False) for name, sizes in SIZES.items() for size in sizes]
    every += [(name, sizes[0], True) for name, sizes in SIZES.items()]
    return [pytest.param(*case, marks=() if case in quick else pytest.mark.slow) for case in every]


@pytest.mark.parametrize(
    ("name", "size", "gradients"),
    cases(
        ("auto_pad", "225x257", False),
        ("codes", "224x112", True),
        ("stl_nchw", "157x120", False),
    ),
)
def test_short_models_in_float64(name, size, gradients, tmp_path):
    """In double precision only rounding is left of the difference: the arithmetic is the reference's."""
    record, weights = reference("biformer_short", f"{name}/")
    variant, fields = MODELS[name]
    with jax.enable_x64(True):
        wide = dict(dtype=jnp.float64, param_dtype=jnp.float64)
        model, variables, _ = zoo.load_pretrained(variant, weights, **SHORT, **fields, **wide)
        path = tmp_path / "gradients.safetensors" if gradients else None
        check(model, variables, at_size(record, size), x64=True, path=path)


def parameters(weights, channels_first: bool):
    """The attention module's parameters, and the way from its gradients back to the reference's names."""
    names = {
        "qkv.qkv": "qkv",
        "qkv_linear": "qkv",
        "wo": "proj",
        "output_linear": "proj",
        "lepe": "lepe",
        "router.emb": "router",
    }
    params, places = {}, {}
    for name, value in weights.items():
        module, _, kind = name.rpartition(".")
        transform = conv if module == "lepe" else pointwise if channels_first else linear
        leaf = "kernel" if kind == "weight" else "bias"
        params.setdefault(names[module], {})[leaf] = transform.apply(value) if leaf == "kernel" else value
        places[name] = (names[module], leaf, transform)

    def back(gradients):
        named = {name: np.asarray(gradients[module][leaf]) for name, (module, leaf, _) in places.items()}
        return {name: places[name][2].invert(g)[0] if name.endswith(".weight") else g for name, g in named.items()}

    return params, back


@pytest.mark.parametrize("name", MODULES)
def test_attention_alone(name):
    """The attention modules in double precision: every pooling, every routing, padding, regions that are cut off."""
    record, weights = reference("biformer_ops", f"{name}/")
    shape = (2, *record["size"], 64)
    with jax.enable_x64(True):
        fields = {**dict(num_heads=2, n_win=7, topk=4), **MODULES[name]}
        module = RoutedAttention(**fields, dtype=jnp.float64, param_dtype=jnp.float64)
        params, back = parameters(weights, name.startswith("nchw"))
        params = jax.tree.map(lambda leaf: leaf.astype(np.float64), params)
        direction = pseudo_normal("direction", shape)

        def objective(params, images):
            output, state = module.apply({"params": params}, images, mutable=["attention"])
            return (output * direction).sum(), (output, state["attention"]["map"][0])

        images = pseudo_images(shape, int(record["seed"])).astype(np.float64)
        differentiate = jax.jit(jax.grad(objective, argnums=(0, 1), has_aux=True), compiler_options=QUICK)
        (gradients, by_input), (output, found) = differentiate(params, images)
    assert output.dtype == np.float64
    expected = record["output"]
    assert_near(sample("output", output, expected.size), expected, FLOAT64_TOLERANCE, "output")
    assert_routes([found.indices], record)
    assert found.weights.shape[-1] == found.indices.shape[-1] * np.prod(found.keys)
    assert found.indices.shape[1] == np.prod(found.regions)
    assert_gradients({**back(gradients), "input": np.asarray(by_input)}, record, FLOAT64_TOLERANCE)


@pytest.mark.parametrize("name", (pytest.param("biformer_tiny", marks=pytest.mark.slow), *MODELS))
def test_round_trip_is_bit_equal(name, tmp_path):
    """Every scheme of names, both ways; the counters of training steps are not kept."""
    if name == "biformer_tiny":
        _, weights, model, variables, report = tiny()
    else:
        _, weights = reference("biformer_short", f"{name}/")
        variant, fields = MODELS[name]
        model, variables, report = zoo.load_pretrained(variant, weights, **SHORT, **fields)
    assert not report.absent_in_source
    zoo.save_pretrained(model, variables, tmp_path / "saved.safetensors")
    saved = load_file(tmp_path / "saved.safetensors")
    kept = {key: value for key, value in weights.items() if not key.endswith("num_batches_tracked")}
    assert saved.keys() == kept.keys()
    for key, value in kept.items():
        np.testing.assert_array_equal(saved[key], value, err_msg=key)


@pytest.mark.slow
def test_checkpoint_of_the_authors_training():
    """Their files hold the weights under `model`, and averages that the authors do not evaluate."""
    record, weights, model, variables, _ = tiny()
    averages = {name: value + 1 for name, value in weights.items()}
    wrapped = {"model": weights, "model_ema": averages, "optimizer": {"state": {}}, "epoch": 299}
    for name in ("biformer_tiny.in1k", "biformer_tiny"):
        _, again, report = zoo.load_pretrained(name, wrapped, num_classes=100)
        assert report.weights == "raw" and "model" in report.unwrapped
        jax.tree.map(np.testing.assert_array_equal, variables, again)
    assert zoo.load_pretrained("biformer_tiny", wrapped, num_classes=100, weights="ema")[2].weights == "ema"


def test_key_maps_have_no_rule_to_spare():
    record = reference("biformer_tiny_official")[0]
    model = zoo.create_model("biformer_tiny", num_classes=100)
    abstract = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32))
    shapes = {name: tuple(shape) for name, shape in json.loads(str(record["shapes"])).items()}
    key_map = family_of("biformer_tiny").key_maps["official"](model)
    assert check_key_map(key_map, abstract, shapes) == ()
    assert len(flatten(abstract)) < len(shapes)
