"""The FLOP counter on whole models and training steps: DaViT's published count, and every primitive known."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

import zoo
from kernels.cost import cost
from tests.closed_forms import davit_products, f32
from train import config, program, sharding, sources


@pytest.mark.parametrize(("name", "size", "published"), [("davit_tiny", 224, "4.522"), ("davit_nano", 16, None)])
def test_davit_counts_what_is_published(name, size, published):
    model = zoo.create_model(name)
    images = f32(1, size, size, 3)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    linear, attended, down, depthwise, stem = davit_products(model, size)
    if published:
        assert f"{(linear + attended + down + depthwise[0] + stem[0]) / 1e9:.3f}" == published
    # The published count takes the convolutions' products with the zeros of the padding as products.
    tpu = cost(model.apply, variables, images, platform="tpu")
    assert tpu.matmul_flops == 2 * (linear + attended + down + depthwise[1] + stem[1])
    # On a CPU the depthwise convolutions are sums of shifted products, no matrix product and no convolution.
    cpu = cost(model.apply, variables, images, platform="cpu")
    assert cpu.matmul_flops == 2 * (linear + attended + down + stem[1])
    # What is left are norms, softmax, GELU, residuals and biases: 1 % in davit_tiny, 5 % in davit_nano.
    assert tpu.matmul_flops < tpu.flops < 1.06 * tpu.matmul_flops


def step_cost(*overrides, platform="cpu"):
    """The model, the batch size and the cost of a training step on the digits, without kernels.

    Those compute the weights once more for the gradient.
    """
    xla = "--config.model.overrides.implementation=xla"
    settings = config.load("configs/digits.py:davit_nano", [xla, *overrides])
    # Of another platform's training step there is only the plan.
    device = AbstractDevice(device_kind=platform, num_cores=1, platform=platform)
    mesh = AbstractMesh((1,) * 4, sharding.AXES, (AxisType.Auto,) * 4, abstract_device=device)
    built = program.build(settings, sources.open_source("digits", split="train"), planned=mesh)
    b = settings.data.batch_size
    batch = {"image": jax.ShapeDtypeStruct((b, 8, 8, 1), jnp.uint8), "label": jax.ShapeDtypeStruct((b,), jnp.int32)}
    if settings.augment.erase_prob:
        batch["erase_box"] = jax.ShapeDtypeStruct((b, 4), jnp.int32)
        batch["erase_seed"] = jax.ShapeDtypeStruct((b,), jnp.uint32)
    arguments = (built.abstract_state, batch, jax.random.key(0), built.task)
    return built.model, b, cost(built.train_step, *arguments, platform=platform)


@pytest.mark.slow
def test_every_primitive_of_a_training_step_has_a_rule():
    model, b, counted = step_cost(platform="tpu")
    linear, attended, down, depthwise, stem = davit_products(model, 8)
    # Three products for every one of the forward pass, but for the images' gradient.
    forward = linear + attended + down + depthwise[1] + stem[1]
    assert counted.matmul_flops == 2 * b * (3 * forward - stem[1])

    everything = (
        "--config.augment.mixup=0.8", "--config.augment.cutmix=1.0", "--config.augment.erase_prob=0.25",
        "--config.accum_steps=2", "--config.remat=full",
    )  # fmt: skip
    # Every block's forward pass is run twice, but for the last linear layer, a third of what they hold.
    layers = linear - model.dims[-1] * model.num_classes
    again = 2 * layers // 3 + attended + depthwise[1]
    assert step_cost(*everything, platform="cuda")[2].matmul_flops == counted.matmul_flops + 2 * b * again
    # On a CPU a gradient of the depthwise convolutions is in part a product with ones.
    assert step_cost(*everything, platform="cpu")[2].matmul_flops > 2 * b * (3 * forward - stem[1] - 3 * depthwise[1])
