"""A model's table: equal to closed forms and to real weights, and made without any."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

import zoo
from tests.closed_forms import taps_inside
from zoo.image_model import ImageModel
from zoo.pretrained import abstract_variables
from zoo.tables import scaled, table

NANO = """\
davit_nano (DaViT): 8 x 8 x 3 to 10 classes

stage          blocks  output      parameters   share       MACs   share
------------------------------------------------------------------------
stem                   8 x 8 x 32         960   0.7 %     46,464   1.3 %
stages_0            1  8 x 8 x 32      26,688  19.2 %  1,831,424  49.4 %
downsamples_0          4 x 4 x 64       8,320   6.0 %    131,072   3.5 %
stages_1            1  4 x 4 x 64     102,528  73.6 %  1,696,768  45.8 %
head                   10                 778   0.6 %        640   0.0 %
------------------------------------------------------------------------
total                                 139,274          3,706,368

MACs: multiply-adds of matrix products and convolutions in the forward pass of one image,
those with the zeros of padding not among them."""


def dual_block_macs(side: int, dim: int, heads: int, window: int = 4) -> int:
    """Both halves of a dual block of `davit_nano`, on a map whose side the window divides."""
    tokens, width = side**2, dim // heads
    positions = taps_inside(side, 3, 1, 1) ** 2 * dim
    linear = tokens * dim * (3 * dim + dim + 8 * dim)
    inside_windows = 2 * tokens * window**2 * dim
    between_channels = 2 * tokens * width * dim
    return 4 * positions + 2 * linear + inside_windows + between_channels


IMAGE_NANOS = [name for name in zoo.list_models("*_nano") if isinstance(zoo.create_model(name), ImageModel)]


def test_macs_and_parameters_of_every_stage():
    info = zoo.model_info("davit_nano")
    macs = {stage.name: stage.macs for stage in info.stages}
    assert macs == {
        "stem": taps_inside(8, 3, 1, 1) ** 2 * 3 * 32,
        "stages_0": dual_block_macs(8, 32, 1),
        "downsamples_0": 4 * 4 * 2 * 2 * 32 * 64,
        "stages_1": dual_block_macs(4, 64, 2),
        "head": 64 * 10,
    }
    assert info.macs == sum(macs.values())
    model = zoo.create_model("davit_nano")
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    counts = {name: sum(leaf.size for leaf in jax.tree.leaves(tree)) for name, tree in params.items()}
    assert {stage.name: stage.parameters for stage in info.stages} == {
        "stem": counts["stem"],
        "stages_0": counts["stages_0_0"],
        "downsamples_0": counts["downsamples_0"],
        "stages_1": counts["stages_1_0"],
        "head": counts["head_norm"] + counts["head"],
    }
    assert info.parameters == sum(counts.values()) == 139_274
    assert str(info) == NANO


@pytest.mark.parametrize("name", IMAGE_NANOS)
def test_stages_add_up_and_have_the_shapes_of_the_run(name):
    info = zoo.model_info(name, batch=2)
    model = zoo.create_model(name, image_size=info.image_size)
    images = jnp.zeros((2, *info.image_size, info.in_chans))
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    # Where there are more tokens than those of the map, blocks hand on all of them.
    method = "forward_tokens" if hasattr(model, "forward_tokens") else "forward_intermediates"
    stem, *features = jax.eval_shape(lambda v: model.apply(v, images, method=method), variables)
    shapes = {stage.name: stage.shape for stage in info.stages if not stage.name.startswith("downsamples")}
    assert shapes.pop("stem") == stem.shape and shapes.pop("head") == (2, 10)
    assert shapes == {f"stages_{i}": feature.shape for i, feature in enumerate(features)}
    assert all(stage.parameters and stage.macs for stage in info.stages if stage.name != "head")
    assert sum(stage.parameters for stage in info.stages) == info.parameters
    assert sum(stage.macs for stage in info.stages) == info.macs
    whole = {kind: sum(leaf.size for leaf in jax.tree.leaves(tree)) for kind, tree in variables.items()}
    assert whole.pop("params") == info.parameters and sum(whole.values()) == info.statistics
    blocks = sum(stage.blocks or 0 for stage in info.stages)
    assert blocks == sum(key.startswith("stages_") for key in variables["params"])


@pytest.mark.parametrize(
    "name",
    ["yaad_h_nano", "gated_deltanet_h_nano", pytest.param("routing_transformer_seq2seq_nano", marks=pytest.mark.slow)],
)
def test_blocks_of_a_sequence_model_add_up(name):
    info = zoo.model_info(name, batch=2)
    variables = abstract_variables(zoo.create_model(name))
    assert (info.image_size, info.in_chans) == (None, None) and info.stages[-1].name == "head"
    assert info.stages[-1].shape == (2, info.length, info.num_classes)
    assert sum(stage.parameters for stage in info.stages) == info.parameters
    assert sum(stage.macs for stage in info.stages) == info.macs
    assert info.parameters == sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    assert sum(stage.blocks or 0 for stage in info.stages) == sum("blocks_" in key for key in variables["params"])
    assert f"{info.length} tokens to a vocabulary of {info.num_classes}\n" in str(info)
    assert "forward pass of a batch of 2 rows of tokens" in str(info)


def test_macs_of_a_block():
    """Projections, attention over all pairs, MLP; the head is the embedding."""
    info = zoo.model_info("transformer_nano")
    tokens, width, hidden = 256, 128, 536
    block = tokens * (4 * width**2 + 3 * width * hidden) + 2 * tokens**2 * width
    assert {stage.name: stage.macs for stage in info.stages} == {"blocks": 4 * block, "head": tokens * width * 257}


def test_options():
    info = zoo.model_info("davit_nano", image_size=(8, 12), num_classes=0, in_chans=1)
    assert (info.image_size, info.in_chans, info.num_classes) == ((8, 12), 1, 0)
    assert info.stages[-1].name == "head" and info.stages[-1].shape == (1, 64) and info.stages[-1].macs == 0
    assert str(info).startswith("davit_nano (DaViT): 8 x 12 x 1 to features\n")
    bare = zoo.model_info("davit_nano", features_only=True)
    assert [stage.name for stage in bare.stages] == ["stem", "stages_0", "downsamples_0", "stages_1"]
    assert bare.num_classes == 0
    one, three = zoo.model_info("davit_nano"), zoo.model_info("davit_nano", batch=3)
    assert three.macs == 3 * one.macs and three.parameters == one.parameters
    assert str(three).endswith("those with the zeros of padding not among them.")
    assert "forward pass of a batch of 3 images," in str(three)
    parsed = json.loads(one.to_json())
    assert parsed["macs"] == one.macs and parsed["stages"][1]["shape"] == [1, 8, 8, 32]


def test_errors():
    with pytest.raises(ValueError, match="did you mean 'davit_nano'"):
        zoo.model_info("davit_nanno")
    with pytest.raises(TypeError, match="did you mean 'image_size'"):
        zoo.model_info("davit_nano", imagesize=3)
    with pytest.raises(ValueError, match="batch must be at least 1, got 0"):
        zoo.model_info("davit_nano", batch=0)


@pytest.mark.slow
def test_weights_are_never_made():
    """1.4 billion parameters are 5.6 GB; the whole process stays far below that."""
    # VmHWM is that of the program itself: `ru_maxrss` begins with what the process that started it had.
    code = (
        "import re, jax, zoo; info = zoo.model_info('davit_giant');"
        "peak = re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1];"
        "print(info.parameters, peak, len(jax.live_arrays()))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    parameters, kilobytes, arrays = map(int, found.stdout.split())
    assert parameters == 1_406_470_120
    assert kilobytes < 2_500_000 and arrays == 0


def test_tables():
    assert table([("a", "bbb", ""), ("cc", "d", "e")], "<><") == ["a   bbb", "cc    d  e"]
    numbers = (7, 999, 1000, 28_360_168, 999_949_999, 999_960_000, 1_406_470_120, 241_650_000_000)
    found = ["7", "999", "1.000 k", "28.36 M", "999.9 M", "1.000 G", "1.406 G", "241.7 G"]
    assert [scaled(number) for number in numbers] == found
