"""Routing Transformer (arXiv:2003.05997) over the pixels of images, one channel's intensity at a time.

An image is the row of its intensities, channels innermost, then columns, then rows: token t is what stands before
the intensity that `logits[:, t]` is about, so that the first token stands for the beginning. The official code has no
token of its own for that and puts 0, black, there. Positions are learned for rows and columns, not relative.
"""

import jax.numpy as jnp
from jax.nn import initializers
from jaxtyping import Array, Float, Int

from zoo.layers import Linear
from zoo.registry import Family, register
from zoo.routing_transformer.heads import unit_scaling_init
from zoo.routing_transformer.model import SHARDING_RULES, RoutingModel, layers_of
from zoo.routing_transformer.weights import IMAGE_KEY_MAPS, PRETRAINED


class RoutingImageTransformer(RoutingModel):
    """Model of images of one size; fields beside those of `RoutingModel`:

    Attributes:
        image_size: height and width.
        channels: of the image; `length` is the product of all three.
    """

    image_size: tuple[int, int] = (32, 32)
    channels: int = 3
    vocab_size: int = 256
    length: int = 3072
    hidden: int = 2048
    feed_forward: str = "relu"
    max_relative: int = 0
    local_relative: bool = False
    routing_relative: bool = False
    dropout: float = 0.3

    def check(self) -> None:
        super().check()
        height, width = self.image_size
        if self.length != height * width * self.channels:
            raise ValueError(
                f"length must be height * width * channels = {height * width * self.channels}, got {self.length}"
            )

    def setup(self):
        super().setup()
        depth = self.channels * self.width
        longest = max(*self.image_size, self.channels)
        table = (self.channels, self.vocab_size, self.width)
        # As one table of `channels * vocab_size` rows has them.
        init = initializers.variance_scaling(0.2, "fan_avg", "uniform", in_axis=(0, 1), out_axis=2)
        self.embedding = self.param("embedding", init, table, self.param_dtype)
        init = initializers.normal(depth**-0.5)
        self.rows = self.param("rows", init, (longest, depth), self.param_dtype)
        self.columns = self.param("columns", init, (longest, depth), self.param_dtype)
        dense = dict(kernel_init=unit_scaling_init, dtype=self.dtype, param_dtype=self.param_dtype)
        self.head = Linear(self.vocab_size, **dense)

    def embed(
        self, tokens: Int[Array, "B N"], first: Int[Array, ""] | int = 0, train: bool = False
    ) -> Float[Array, "B N C"]:
        if tokens.shape[1] > self.length:
            raise ValueError(f"an image has {self.length} tokens, got {tokens.shape[1]}")
        position = first + jnp.arange(tokens.shape[1])
        channel, pixel = position % self.channels, position // self.channels
        row, column = pixel // self.image_size[1], pixel % self.image_size[1]
        x = self.embedding[channel, tokens] * self.width**0.5
        for table, place in ((self.rows, row), (self.columns, column)):
            depth = table.shape[1]
            x = x + table.reshape(-1, self.channels, self.width)[place, channel] * depth**0.5
        return x if self.dtype is None else x.astype(self.dtype)

    def logits(self, x: Float[Array, "*batch C"]) -> Float[Array, "*batch V"]:
        return self.head(x)


_LOCAL = dict(local_heads=8, routing_heads=0)
_CIFAR10 = dict(image_size=(32, 32), length=3072, width=1024, depth=12, block=256)
_IMAGENET = dict(image_size=(64, 64), length=12288, width=1024, depth=24, block=256)
_MNIST = dict(image_size=(28, 28), channels=1, length=784, width=512, depth=12, block=56)

VARIANTS = {
    "routing_transformer_cifar10": dict(_CIFAR10, clusters=6, window=512),
    "routing_transformer_cifar10_strided": dict(
        _CIFAR10, clusters=6, window=512, routing_heads=2, cluster_strided_heads=2
    ),
    "routing_transformer_cifar10_local": dict(_CIFAR10, **_LOCAL),
    "routing_transformer_cifar10_full": dict(_CIFAR10, **_LOCAL) | dict(block=3072, look=0),
    "routing_transformer_imagenet64": dict(_IMAGENET, local_heads=12, clusters=8, window=2048),
    "routing_transformer_imagenet64_strided": dict(
        _IMAGENET, local_heads=6, routing_heads=5, cluster_strided_heads=5, clusters=8, window=2048
    ),
    "routing_transformer_imagenet64_local": dict(_IMAGENET, local_heads=16, routing_heads=0),
    "routing_transformer_imagenet64_full": dict(_IMAGENET, local_heads=16, routing_heads=0) | dict(block=12288, look=0),
    "routing_transformer_mnist": dict(_MNIST, local_heads=2, routing_heads=2, clusters=7, window=112),
    "routing_transformer_mnist_strided": dict(
        _MNIST, local_heads=4, routing_heads=2, cluster_strided_heads=2, clusters=7, window=112
    ),
    "routing_transformer_mnist_local": dict(_MNIST, local_heads=4, routing_heads=0),
    "routing_transformer_mnist_full": dict(_MNIST, local_heads=4, routing_heads=0) | dict(block=784, look=0),
    # Ours, for the handwritten digits: 17 intensities, and token 17 for the beginning. Strictly causal membership.
    "routing_transformer_image_nano": dict(
        image_size=(8, 8),
        channels=1,
        vocab_size=18,
        length=64,
        width=128,
        depth=4,
        hidden=256,
        local_heads=2,
        routing_heads=2,
        block=16,
        clusters=4,
        window=16,
        membership="nearest",
        dropout=0.1,
    ),
}


register(
    Family(
        name="routing_image_transformer",
        module=RoutingImageTransformer,
        variants=VARIANTS,
        pretrained=PRETRAINED,
        key_maps=IMAGE_KEY_MAPS,
        sharding_rules=((r"params/embedding", (None, "tensor", "fsdp")), *SHARDING_RULES),
        layers=layers_of,
    )
)
