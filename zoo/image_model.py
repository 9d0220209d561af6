"""What all image models share: their fields, their shape from stem to head, the image sizes that they take."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from zoo.layers import Dtype, Remat


class ImageModel(nn.Module):
    """A stem, stages of blocks with downsamplings between them, a head.

    A family's `setup` makes `stem`, `stages` (a list of lists of blocks), `downsamples` (one before each stage but
    the first; none where blocks downsample themselves), all called as `f(x, train)`, and, unless `features_only`,
    the head. It gives `feature_info` and `forward_head`, and `size_multiple` and `least_size` where sizes are
    limited.

    Attributes:
        num_classes: width of the classifier; 0 leaves it out, and the model returns the pooled features.
        in_chans: channels of the input.
        image_size: side, or (height, width), of the images that the model is made for; None: any that it takes.
        features_only: no head; the model returns every stage's output.
        depths: blocks of every stage.
        drop_path_rate: stochastic depth of the last block.
        remat: what the backward pass recomputes, see `zoo.layers.rematerialize`.
        implementation: of the attention primitives, see `kernels.dispatch`.
        dtype: of the computation, None for that of the images and parameters; param_dtype: of the parameters.
    """

    num_classes: int = 1000
    in_chans: int = 3
    image_size: int | tuple[int, int] | None = None
    features_only: bool = False
    depths: tuple[int, ...] = ()
    drop_path_rate: float = 0.0
    remat: Remat = "none"
    implementation: str | tuple[str, ...] | None = None
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    def check(self) -> None:
        """Raises `ValueError` for fields that the model cannot have, such as an `image_size` that does not fit."""
        if self.in_chans < 1 or self.num_classes < 0:
            raise ValueError(
                f"in_chans must be at least 1 and num_classes at least 0, got {self.in_chans} and {self.num_classes}"
            )
        self.check_image_size(*self.input_size())

    def example_inputs(self, batch: int = 1) -> dict[str, jax.ShapeDtypeStruct]:
        """Arguments of a call by name, as shapes and dtypes, of the size that the model is made for."""
        return {"images": jax.ShapeDtypeStruct((batch, *self.input_size(), self.in_chans), jnp.float32)}

    @property
    def feature_info(self) -> tuple[tuple[int, int], ...]:
        """Channels and total stride of every stage's output."""
        raise NotImplementedError

    @property
    def size_multiple(self) -> tuple[int, int]:
        """What the images' heights and widths must be multiples of."""
        return 1, 1

    @property
    def least_size(self) -> tuple[int, int]:
        """The smallest height and width that the model takes."""
        return self.size_multiple

    def join_losses(self, losses: Sequence[Float[Array, ""]]) -> Float[Array, ""]:
        """One loss of those of the heads that the model has in training: their mean."""
        return sum(losses) / len(losses)

    def drop_path_rates(self) -> list[float]:
        """The rate of every block, in order, growing linearly from 0."""
        blocks = sum(self.depths)
        return [self.drop_path_rate * i / max(blocks - 1, 1) for i in range(blocks)]

    def input_size(self, default: int = 224) -> tuple[int, int]:
        """Height and width that the model is made for, else the nearest to a square of side `default`."""
        if self.image_size is None:
            return self.nearest_size(default, default)
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else tuple(self.image_size)

    def nearest_size(self, height: int, width: int) -> tuple[int, int]:
        """The nearest height and width that the model takes; of two equally near ones the smaller."""

        def nearest(side: int, multiple: int, least: int) -> int:
            down = side // multiple * multiple
            return max(down if side - down <= multiple / 2 else down + multiple, -(-least // multiple) * multiple)

        return tuple(map(nearest, (height, width), self.size_multiple, self.least_size))

    def check_image_size(self, height: int, width: int) -> None:
        """Raises `ValueError` for a size that the model cannot take; the message names the nearest that it can."""
        nearest = self.nearest_size(height, width)
        if nearest != (height, width):
            (rows, columns), least = self.size_multiple, self.least_size
            wanted = f"heights of at least {least[0]} and widths of at least {least[1]} pixels"
            if (rows, columns) != (1, 1):
                wanted = f"heights that are multiples of {rows} and widths that are multiples of {columns} pixels"
            raise ValueError(
                f"{type(self).__name__} as configured takes {wanted}; got {height}x{width}, the nearest that fits is "
                f"{nearest[0]}x{nearest[1]}"
            )

    def check_images(self, images: Float[Array, "..."]) -> None:
        """Raises `ValueError` for images that the model cannot take."""
        if images.ndim != 4 or images.shape[-1] != self.in_chans:
            raise ValueError(f"images must be (batch, height, width, {self.in_chans}), got {images.shape}")
        self.check_image_size(*images.shape[1:3])

    def forward_intermediates(
        self, images: Float[Array, "B H W C"], train: bool = False
    ) -> list[Float[Array, "B h w D"]]:
        """The stem's output, then every stage's, each `(B, h, w, channels)`."""
        self.check_images(images)
        x = self.stem(images, train)
        features = [x]
        for i, blocks in enumerate(self.stages):
            if i and self.downsamples:
                x = self.downsamples[i - 1](x, train)
            for block in blocks:
                x = block(x, train)
            features.append(x)
        return features

    def forward_features(self, images: Float[Array, "B H W C"], train: bool = False) -> Float[Array, "B h w D"]:
        """The last stage's output, `(B, h, w, channels)`."""
        return self.forward_intermediates(images, train)[-1]

    def forward_head(self, features: Float[Array, "B h w D"], train: bool = False, pre_logits: bool = False) -> Any:
        """From the last stage's output to the logits, `(B, num_classes)`.

        Args:
            features: the output of `forward_features`.
            train: whether the model is in training.
            pre_logits: stop before the classifier and return its input, as with `num_classes=0`.
        """
        raise NotImplementedError

    def __call__(self, images: Float[Array, "B H W C"], train: bool = False) -> Any:
        """Logits `(B, num_classes)`; with `features_only` a tuple of the stages' outputs."""
        if self.features_only:
            return tuple(self.forward_intermediates(images, train)[1:])
        return self.forward_head(self.forward_features(images, train), train)


def layers_of(model: ImageModel) -> tuple[Callable[[str], int], int]:
    """What `Family.layers` wants: the stem is 0, every block one more, a downsampling belongs to the block after it."""
    first = [1 + sum(model.depths[:i]) for i in range(len(model.depths) + 1)]

    def layer_of(path: str) -> int:
        if found := re.match(r"stages_(\d+)_(\d+)/", path):
            return first[int(found[1])] + int(found[2])
        if found := re.match(r"downsamples_(\d+)/", path):
            return first[int(found[1]) + 1]
        return 0 if path.startswith("stem/") else first[-1]

    return layer_of, first[-1]
