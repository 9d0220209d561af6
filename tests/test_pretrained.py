"""Checkpoint to variables and back: right to the bit, or one error that lists all that is wrong."""

import dataclasses
import hashlib
import json
import os

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from tests.toy_family import (
    DIM,
    HEADS,
    Toy,
    assert_leaves,
    tensorflow_arrays,
    torch_arrays,
    wanted_leaves,
)
from train.checkpoint import Checkpoints
from zoo.errors import WeightsError
from zoo.keymap import flatten
from zoo.pretrained import load_pretrained, save_pretrained

pytestmark = pytest.mark.usefixtures("toy")


def test_every_leaf_is_the_checkpoints():
    arrays = torch_arrays()
    counters = {"stem.bn.num_batches_tracked": np.array(5), "blocks.0.index": np.arange(4)}
    model, variables, report = load_pretrained("toy_tiny", arrays | counters)
    assert model == Toy()
    assert_leaves(variables, wanted_leaves(arrays))
    assert report.naming == "torch" and report.source == "mapping" and report.digest == "unknown"
    assert report.ignored == {
        "a counter of training steps": ("stem.bn.num_batches_tracked",),
        "a constant table": ("blocks.0.index",),
    }
    assert report.leaves == 16 and report.statistics == 2 * DIM
    assert report.parameters == sum(v.size for k, v in arrays.items() if "running" not in k)
    images = jnp.ones((2, 12, 12, 3))
    assert model.apply(variables, images).shape == (2, 10)


def test_namings_agree():
    arrays = torch_arrays()
    wanted = wanted_leaves(arrays)
    for given, naming in ((tensorflow_arrays(arrays), "tensorflow"), (wanted, "zoo")):
        _, variables, report = load_pretrained("toy_tiny", given)
        assert report.naming == naming
        assert_leaves(variables, wanted)
        _, variables, report = load_pretrained("toy_tiny", given, naming=naming)
        assert_leaves(variables, wanted)


def test_source_without_its_prefix_or_with_neighbours():
    arrays = torch_arrays()
    body = {f"tower.{k}": v for k, v in arrays.items() if "head" not in k}
    model, variables, report = load_pretrained("toy_tiny", body | {"text.w": np.ones(3)})
    assert model.num_classes == 0
    assert report.naming == "tower" and report.ignored == {"outside 'tower.'": ("text.w",)}
    assert report.absent_in_source == {"params/head_norm/scale": 1.0, "params/head_norm/bias": 0.0}
    wanted = {k: v for k, v in wanted_leaves(arrays).items() if "head/" not in k}
    wanted["params/head_norm/scale"] = np.ones(DIM, np.float32)
    wanted["params/head_norm/bias"] = np.zeros(DIM, np.float32)
    assert_leaves(variables, wanted)
    bare = {k.removeprefix("tower."): v for k, v in body.items()}
    assert_leaves(load_pretrained("toy_tiny", bare, naming="tower")[1], wanted)
    model, variables, report = load_pretrained("toy_tiny", body, num_classes=4)
    assert report.replaced == ("params/head/bias", "params/head/kernel")


def test_averages_beside_raw_variables():
    raw, average = torch_arrays(), {k: v + 1 for k, v in torch_arrays().items()}
    suffix = "/ExponentialMovingAverage"
    both = tensorflow_arrays(raw)
    both |= {k + suffix: v for k, v in tensorflow_arrays(average).items() if "moving" not in k}
    # The moving statistics of a batch norm have no average of their own.
    statistics = {k: v for k, v in wanted_leaves(raw).items() if k.startswith("batch_stats")}
    _, variables, report = load_pretrained("toy_tiny", both)
    assert report.weights == "ema"
    assert_leaves(variables, wanted_leaves(average) | statistics)
    _, variables, report = load_pretrained("toy_tiny", both, weights="raw")
    assert report.weights == "raw" and len(report.ignored["the moving average of raw weights"]) == 22
    assert_leaves(variables, wanted_leaves(raw))
    with pytest.raises(WeightsError, match="the mapping holds no moving average"):
        load_pretrained("toy_tiny", tensorflow_arrays(raw), weights="ema")


def test_torch_wrappers():
    raw, average = torch_arrays(), {k: v + 1 for k, v in torch_arrays().items()}
    both = {"model": {f"module.{k}": v for k, v in raw.items()}, "model_ema": average, "optimizer": {}}
    assert_leaves(load_pretrained("toy_tiny", both)[1], wanted_leaves(average))
    _, variables, report = load_pretrained("toy_tiny", both, weights="raw")
    assert report.unwrapped == ("model", "module.") and report.beside == ("optimizer",)
    assert_leaves(variables, wanted_leaves(raw))


@pytest.mark.parametrize("averaged", (False, True))
def test_train_loop_directory(tmp_path, averaged):
    raw = Toy(num_classes=4).init(jax.random.key(3), jnp.zeros((1, 12, 12, 3)))
    average = jax.tree.map(lambda x: x + 1, raw) if averaged else {}
    statistics = {"batch_stats": raw["batch_stats"]}
    state = {"step": jnp.array(5), "params": raw["params"], "model_state": statistics, "ema": average}
    with Checkpoints(tmp_path / "run" / "checkpoints", every_steps=1, keep=2) as checkpoints:
        checkpoints.save(5, state, data={}, config={})
        checkpoints.save(7, jax.tree.map(lambda x: x * 2, state), data={}, config={})
    doubled = jax.tree.map(lambda x: 2 * np.asarray(x), average or raw)
    model, variables, report = load_pretrained("toy_tiny", tmp_path / "run")
    assert model.num_classes == 4
    assert report.format == "orbax" and report.naming == "zoo" and report.unwrapped == ("step 7",)
    assert report.weights == ("ema" if averaged else None)
    assert_leaves(variables, flatten(doubled))
    _, variables, report = load_pretrained("toy_tiny", tmp_path / "run" / "checkpoints" / "5", weights="raw")
    assert report.unwrapped == ("step 5",)
    assert_leaves(variables, flatten(jax.tree.map(np.asarray, raw)))
    with pytest.raises(WeightsError, match="no checkpoint"):
        load_pretrained("toy_tiny", tmp_path)


def test_classes_of_the_source():
    model, variables, report = load_pretrained("toy_tiny", torch_arrays(classes=7))
    assert model.num_classes == 7 and report.replaced == ()
    model, variables, report = load_pretrained("toy_tiny", torch_arrays(classes=7), num_classes=7)
    assert report.replaced == ()


def test_fresh_classifier():
    arrays = torch_arrays()
    model, variables, report = load_pretrained("toy_tiny", arrays, num_classes=4, seed=1)
    assert model.num_classes == 4
    assert report.replaced == ("params/head/bias", "params/head/kernel")
    assert report.ignored == {"the classifier is replaced": ("head.fc.weight", "head.fc.bias")}
    initial = flatten(model.init(jax.random.key(1), jnp.zeros((1, 12, 12, 3))))
    wanted = wanted_leaves(arrays) | {path: np.asarray(initial[path]) for path in report.replaced}
    assert_leaves(variables, wanted)
    other = load_pretrained("toy_tiny", arrays, num_classes=4, seed=2)[1]
    assert not np.array_equal(other["params"]["head"]["kernel"], variables["params"]["head"]["kernel"])


def test_classifier_left_out():
    arrays = torch_arrays()
    model, variables, report = load_pretrained("toy_tiny", arrays, num_classes=0)
    assert model.num_classes == 0 and report.replaced == ()
    assert report.ignored == {"num_classes=0 drops them": ("head.fc.weight", "head.fc.bias")}
    assert_leaves(variables, {k: v for k, v in wanted_leaves(arrays).items() if "head/" not in k})


def test_damaged_classifiers_are_not_taken_as_fresh():
    arrays = torch_arrays()
    del arrays["head.fc.weight"]
    with pytest.raises(WeightsError) as error:
        load_pretrained("toy_tiny", arrays)
    assert error.value.problems == {
        "missing": ("'head.fc.weight' (10, 8), for params/head/kernel; num_classes= makes a fresh one",)
    }
    load_pretrained("toy_tiny", arrays, num_classes=5)
    arrays = torch_arrays()
    arrays["head.fc.weight"] = arrays["head.fc.weight"].T
    with pytest.raises(WeightsError) as error:
        load_pretrained("toy_tiny", arrays)
    assert error.value.problems == {"misshapen": ("'head.fc.weight' is (8, 10), (10, 8) is wanted: looks transposed",)}


@pytest.mark.parametrize("chans", (1, 2, 4, 7))
def test_adapted_input_convolution(chans):
    arrays = torch_arrays()
    model, variables, report = load_pretrained("toy_tiny", arrays, in_chans=chans)
    kernel = np.asarray(variables["params"]["stem"]["kernel"])
    assert model.in_chans == chans and kernel.shape == (3, 3, chans, DIM)
    assert report.adapted == {"params/stem/kernel": f"3 -> {chans} channels"}
    rgb = wanted_leaves(arrays)["params/stem/kernel"]
    # timm's rule: the sum for one channel, else r g b r g ... scaled by 3 / n.
    if chans == 1:
        wanted = rgb[:, :, :1] + rgb[:, :, 1:2] + rgb[:, :, 2:]
    else:
        wanted = np.stack([rgb[:, :, c % 3] * (3 / chans) for c in range(chans)], axis=2)
    np.testing.assert_allclose(kernel, wanted, rtol=1e-6, atol=1e-6)


def test_channels_of_the_source():
    model, _, report = load_pretrained("toy_tiny", torch_arrays(chans=1))
    assert model.in_chans == 1 and report.adapted == {}
    with pytest.raises(WeightsError, match="in_chans=2: only kernels of three channels can be adapted"):
        load_pretrained("toy_tiny", torch_arrays(chans=1), in_chans=2)


def test_resized_tables():
    arrays = torch_arrays()
    model, variables, report = load_pretrained("toy_tiny", arrays, image_size=20, resize="bicubic")
    assert model.image_size == 20 == report.image_size
    assert report.resized == {f"params/blocks_{i}_table": "(2, 5, 5) -> (2, 9, 9), bicubic" for i in range(2)}
    wanted = jax.image.resize(arrays["blocks.1.table"], (HEADS, 9, 9), "bicubic")
    np.testing.assert_array_equal(variables["params"]["blocks_1_table"], wanted)
    with pytest.raises(WeightsError, match=r"\(3, 5, 5\), \(2, 9, 9\) is wanted \(only the two sides"):
        load_pretrained("toy_tiny", arrays | {"blocks.0.table": np.ones((3, 5, 5), np.float32)}, image_size=20)
    with pytest.raises(ValueError, match="resize must be one of 'bilinear', 'bicubic', 'geometric', got 'nearest'"):
        load_pretrained("toy_tiny", arrays, resize="nearest")


def problems(arrays, **options):
    with pytest.raises(WeightsError) as error:
        load_pretrained("toy_tiny", arrays, **options)
    return error.value.problems


def test_renamed():
    arrays = torch_arrays()
    arrays["stem.bn.wieght"] = arrays.pop("stem.bn.weight")
    assert problems(arrays) == {
        "missing": ("'stem.bn.weight' (8,), for params/norm/scale",),
        "unexpected": ("'stem.bn.wieght' (8,); nearest missing name: 'stem.bn.weight'",),
    }


def test_dropped_added_transposed_and_not_finite_at_once():
    arrays = torch_arrays()
    del arrays["blocks.1.qkv.bias"]
    arrays["blocks.2.qkv.bias"] = np.ones(24, np.float32)
    arrays["optimizer"] = np.ones(3)
    arrays["stem.conv.weight"] = arrays["stem.conv.weight"].transpose(3, 2, 1, 0)
    arrays["blocks.0.table"] = arrays["blocks.0.table"].copy()
    arrays["blocks.0.table"][1, 2, 3:] = np.nan, np.inf
    arrays["head.norm.bias"] = np.arange(8)
    found = problems(arrays)
    assert found == {
        "missing": ("'blocks.1.qkv.bias' (24,), for params/blocks_1_qkv/bias",),
        "unexpected": (
            "'blocks.2.qkv.bias' (24,); nearest missing name: 'blocks.1.qkv.bias'",
            "'optimizer' (3,)",
        ),
        "misshapen": ("'stem.conv.weight' is (3, 3, 3, 8), (8, 3, 3, 3) is wanted: looks transposed",),
        "mistyped": ("'head.norm.bias' is int64, a floating dtype is wanted",),
        "not finite": ("'blocks.0.table' holds 2 NaN or infinite values, the first at [1, 2, 3]",),
    }


def test_message_is_short_and_whole():
    with pytest.raises(WeightsError) as error:
        load_pretrained("toy_deep", {k: v for k, v in torch_arrays().items() if "blocks" not in k})
    message = str(error.value)
    assert message.startswith("the mapping does not fit toy_deep (read with the names of 'torch')\n  missing (12):\n")
    assert len(error.value.problems["missing"]) == 12
    unknown = torch_arrays() | {f"more.{i}": np.ones(1) for i in range(60)}
    with pytest.raises(WeightsError, match=r"unexpected \(60\)[\s\S]*\.\.\. and 40 more"):
        load_pretrained("toy_tiny", unknown)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="unknown model 'toy_tinny'; did you mean 'toy_tiny'"):
        load_pretrained("toy_tinny", torch_arrays())
    with pytest.raises(ValueError, match="unknown naming 'troch' of family 'toy'; did you mean 'torch'"):
        load_pretrained("toy_tiny", torch_arrays(), naming="troch")
    with pytest.raises(ValueError, match="num_classes must be at least 0 or None, got -1"):
        load_pretrained("toy_tiny", torch_arrays(), num_classes=-1)
    # Before anything is read.
    with pytest.raises(TypeError, match="toy_tiny takes no argument 'clases'"):
        load_pretrained("toy_tiny", "nowhere.safetensors", clases=3)
    with pytest.raises(TypeError, match="toy_tiny takes no argument 'clases'"):
        load_pretrained("toy_tiny", torch_arrays(), clases=3)
    with pytest.raises(ValueError, match="'toy_tiny' alone names no weights: pass source=, or name .* toy_tiny.hub"):
        load_pretrained("toy_tiny")
    with pytest.raises(ValueError, match="'toy_deep' alone names no weights: pass source=, it has no published"):
        load_pretrained("toy_deep")
    known = r"none of its 1 names is one of toy's \(torch, tensorflow, tower, zoo\): 'x'"
    with pytest.raises(WeightsError, match=known):
        load_pretrained("toy_tiny", {"x": np.ones(3)})


@pytest.mark.parametrize("dtype", (np.float16, np.float64, ml_dtypes.bfloat16))
def test_other_dtypes_are_cast(tmp_path, dtype):
    arrays = torch_arrays(dtype=dtype)
    _, variables, report = load_pretrained("toy_tiny", arrays)
    name = np.dtype(dtype).name
    assert set(report.casts.values()) == {f"{name} -> float32"} and len(report.casts) == 16
    assert_leaves(variables, wanted_leaves({k: v.astype(np.float32) for k, v in arrays.items()}))


def test_values_too_large_for_the_parameters():
    arrays = torch_arrays(dtype=np.float64)
    arrays["stem.conv.bias"][2] = 1e60
    assert problems(arrays) == {"not finite": ("'stem.conv.bias' too large for float32",)}


def test_integer_leaves():
    arrays = torch_arrays() | {"count": np.array([3, 2**31 - 1])}
    _, variables, report = load_pretrained("toy_tiny", arrays, counts=True)
    assert report.casts == {"routing/count": "int64 -> int32"}
    assert_leaves(variables, wanted_leaves(arrays) | {"routing/count": arrays["count"].astype(np.int32)})
    arrays["count"] += 1
    assert problems(arrays, counts=True) == {"not finite": ("'count' too large for int32",)}
    arrays["count"] = np.ones(2, np.float32)
    assert problems(arrays, counts=True) == {"mistyped": ("'count' is float32, int32 is wanted",)}


def test_bfloat16_round_trip(tmp_path):
    arrays = torch_arrays(dtype=ml_dtypes.bfloat16)
    model, variables, report = load_pretrained("toy_tiny", arrays, param_dtype=jnp.bfloat16)
    # Flax keeps batch statistics in float32 whatever the parameters are.
    assert set(report.casts) == {"batch_stats/norm/mean", "batch_stats/norm/var"}
    for suffix in ("safetensors", "npz"):
        path = tmp_path / f"saved.{suffix}"
        save_pretrained(model, variables, path)
        _, again, _ = load_pretrained("toy_tiny", path, param_dtype=jnp.bfloat16)
        assert_leaves(again, {k: np.asarray(v) for k, v in flatten(variables).items()})


@pytest.mark.parametrize("naming", ("torch", "tensorflow"))
def test_round_trip_is_bit_equal(tmp_path, naming):
    arrays = torch_arrays()
    arrays = arrays if naming == "torch" else tensorflow_arrays(arrays)
    model, variables, _ = load_pretrained("toy_tiny", arrays)
    save_pretrained(model, variables, tmp_path / "saved.safetensors", naming=naming)
    saved = safetensors.numpy.load_file(tmp_path / "saved.safetensors")
    save_pretrained(model, variables, tmp_path / "saved.npz", naming=naming)
    with np.load(tmp_path / "saved.npz") as file:
        for found in (saved, file):
            assert set(found) == set(arrays)
            for name, array in arrays.items():
                assert found[name].dtype == array.dtype and found[name].shape == array.shape
                assert found[name].tobytes() == np.ascontiguousarray(array).tobytes(), name


def test_saved_dtype(tmp_path):
    arrays = torch_arrays()
    model, variables, _ = load_pretrained("toy_tiny", arrays)
    save_pretrained(model, variables, tmp_path / "half.safetensors", dtype=jnp.float16)
    saved = safetensors.numpy.load_file(tmp_path / "half.safetensors")
    for name, array in arrays.items():
        np.testing.assert_array_equal(saved[name], array.astype(np.float16))
    variables["params"]["head"]["bias"] = jnp.full(10, 1e6)
    with pytest.raises(WeightsError, match="'params/head/bias' holds values too large for dtype=float16"):
        save_pretrained(model, variables, tmp_path / "large.safetensors", dtype="float16")
    with pytest.raises(ValueError, match="dtype must be a floating dtype or None, got 'int8'"):
        save_pretrained(model, variables, tmp_path / "int.safetensors", dtype="int8")
    assert sorted(os.listdir(tmp_path)) == ["half.safetensors"]


def test_saving_what_does_not_fit(tmp_path):
    model, variables, _ = load_pretrained("toy_tiny", torch_arrays())
    path = tmp_path / "saved.safetensors"
    with pytest.raises(WeightsError, match="the variables are not those of the model") as error:
        save_pretrained(dataclasses.replace(model, num_classes=3), variables, path)
    assert set(error.value.problems) == {"misshapen"}
    assert set(error.value.problems["misshapen"]) == {
        "'params/head/kernel' is (8, 10), (8, 3) is wanted",
        "'params/head/bias' is (10,), (3,) is wanted",
    }
    with pytest.raises(WeightsError) as error:
        save_pretrained(model, {"params": variables["params"]}, path)
    assert error.value.problems == {"missing": ("'batch_stats/norm/mean' (8,)", "'batch_stats/norm/var' (8,)")}
    # The tower's names have no classifier, and no head norm but the identity.
    with pytest.raises(WeightsError, match="naming= may be 'torch', 'tensorflow', 'zoo'") as error:
        save_pretrained(model, variables, path, naming="tower")
    assert len(error.value.problems["nameless"]) == 4
    with pytest.raises(ValueError, match="unknown naming 'timm'"):
        save_pretrained(model, variables, path, naming="timm")
    with pytest.raises(TypeError, match="model must be a model of the zoo, got Dense"):
        save_pretrained(nn.Dense(3), variables, path)
    assert os.listdir(tmp_path) == []


def test_tower_round_trip(tmp_path):
    body = {f"tower.{k}": v for k, v in torch_arrays().items() if "head" not in k}
    model, variables, _ = load_pretrained("toy_tiny", body)
    save_pretrained(model, variables, tmp_path / "saved.safetensors", naming="tower")
    saved = safetensors.numpy.load_file(tmp_path / "saved.safetensors")
    assert set(saved) == set(body)
    assert all(saved[name].tobytes() == array.tobytes() for name, array in body.items())


def test_report(tmp_path):
    path = tmp_path / "weights.safetensors"
    arrays = {k: v.astype(np.float16) for k, v in torch_arrays().items()}
    safetensors.numpy.save_file(arrays, path)
    _, _, report = load_pretrained("toy_tiny", path, num_classes=3, in_chans=1, image_size=20)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert str(report).splitlines() == [
        f"toy_tiny from {path}",
        "  format    safetensors, names as in torch",
        "  loaded    16 leaves, 895 parameters and 16 statistics",
        f"  sha256    {digest} (digest unknown)",
        "  model     num_classes=3, in_chans=1, image_size=20",
        "  fresh     params/head/bias, params/head/kernel",
        "  cast      float16 -> float32: 14 leaves",
        "  adapted   params/stem/kernel: 3 -> 1 channels",
        "  resized   params/blocks_0_table: (2, 5, 5) -> (2, 9, 9), bilinear",
        "  resized   params/blocks_1_table: (2, 5, 5) -> (2, 9, 9), bilinear",
        "  ignored   2 keys, the classifier is replaced: head.fc.bias, head.fc.weight",
    ]
    parsed = json.loads(report.to_json())
    assert parsed["sha256"] == digest and parsed["replaced"] == list(report.replaced)
    assert set(parsed) == {field.name for field in dataclasses.fields(report)}
