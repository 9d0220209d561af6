"""Augmentation on the device, inside the jitted step: normalise, fill erased boxes, mix examples and labels.

All functions are pure, with shapes that no draw changes, so that nothing compiles twice. They are written for
the global batch: under `jit` with the batch sharded over a mesh, XLA moves what has to move.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, UInt8, UInt32

from kernels.dense import accumulator_dtype
from zoo.registry import nearest

ERASE_MODES = ("pixel", "rand", "const")
MIX_MODES = ("batch", "pair", "elem")


def normalize(
    images: UInt8[Array, "b h w c"], mean: Sequence[float], std: Sequence[float], dtype=jnp.float32
) -> Float[Array, "b h w c"]:
    """(images / 255 - mean) / std, computed in float32 (float64 for that `dtype`) and returned in `dtype`.

    Args:
        images: pixels from 0 to 255.
        mean: per channel, of pixels scaled to [0, 1]; one value serves all channels.
        std: like `mean`.
        dtype: of the result.

    Raises:
        ValueError: where the number of values is neither 1 nor the number of channels.
    """
    channels = images.shape[-1]
    for name, values in (("mean", mean), ("std", std)):
        if len(values) not in (1, channels):
            raise ValueError(f"{name}: expected 1 or {channels} values for {channels} channels, got {tuple(values)}")
    acc = accumulator_dtype(dtype)
    return ((images.astype(acc) / 255 - jnp.asarray(mean, acc)) / jnp.asarray(std, acc)).astype(dtype)


def random_erase(
    images: Float[Array, "b h w c"], boxes: Int[Array, "b 4"], seeds: UInt32[Array, " b"], mode: str = "pixel"
) -> Float[Array, "b h w c"]:
    """Replaces one box of each image by noise; the host has drawn the boxes (`train.crops.RandomErasing`).

    Args:
        images: normalised images.
        boxes: top, left, height, width of each image's box; a size of 0 erases nothing.
        seeds: of each image's noise, which therefore does not depend on its place in the batch.
        mode: "pixel" draws every value from N(0, 1), "rand" one value per channel and image, "const" takes 0,
            which is the mean colour.

    Returns:
        Images of the same shape and dtype.

    Raises:
        ValueError: for an unknown mode.

    Source: Zhong et al., arXiv 1708.04896, with the fills of timm, which erases after the normalisation.
    """
    if mode not in ERASE_MODES:
        raise ValueError(f"mode: unknown mode {mode!r}{nearest(mode, ERASE_MODES)}")
    _, height, width, channels = images.shape
    fill = jnp.zeros((), images.dtype)
    if mode != "const":
        shape = (height, width, channels) if mode == "pixel" else (1, 1, channels)
        noise = jax.vmap(lambda seed: jax.random.normal(jax.random.key(seed), shape, jnp.float32))(seeds)
        fill = noise.astype(images.dtype)
    top, left, h, w = jnp.split(boxes, 4, axis=1)
    inside = _box_mask(top, left, top + h, left + w, height, width)
    return jnp.where(inside, fill, images)


def _box_mask(y0, x0, y1, x1, height: int, width: int):
    """Where a pixel is in its image's box: (b, height, width, 1) from edges of shape (b, 1)."""
    rows, columns = jnp.arange(height), jnp.arange(width)
    in_rows, in_columns = (rows >= y0) & (rows < y1), (columns >= x0) & (columns < x1)
    return (in_rows[:, :, None] & in_columns[:, None, :])[..., None]


def one_hot_smooth(
    labels: Int[Array, " b"], num_classes: int, smoothing: float = 0.0
) -> Float[Array, "b {num_classes}"]:
    """Targets of smoothing / num_classes everywhere, and 1 - smoothing more at the label; float32.

    Source: Szegedy et al., arXiv 1512.00567, section 7.

    Raises:
        ValueError: for a smoothing outside of [0, 1).
    """
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing: expected a share in [0, 1), got {smoothing}")
    return jax.nn.one_hot(labels, num_classes, dtype=jnp.float32) * (1 - smoothing) + smoothing / num_classes


def mixup_cutmix(
    key: Key[Array, ""],
    images: Float[Array, "b h w c"],
    labels: Float[Array, "b k"],
    *,
    mixup_alpha: float,
    cutmix_alpha: float,
    prob: float = 1.0,
    switch_prob: float = 0.5,
    mode: str = "batch",
) -> tuple[Float[Array, "b h w c"], Float[Array, "b k"]]:
    """Mixes each example with the one as far from the batch's end as it is from its beginning.

    Mixup blends the images with the weights lambda and 1 - lambda; cutmix replaces a box of them. Labels are
    blended with lambda, for cutmix the share of pixels that the box, as clipped by the image, leaves.

    Args:
        key: decides every draw.
        images: normalised images.
        labels: one row of target probabilities each.
        mixup_alpha: lambda is drawn from Beta(alpha, alpha); 0 turns mixup off.
        cutmix_alpha: the same for cutmix, where sqrt(1 - lambda) is the box's share of each side.
        prob: the probability of mixing at all.
        switch_prob: the probability of cutmix rather than mixup, where both are on.
        mode: what shares one set of draws: the "batch", a "pair" of partners, or nobody, for each "elem".

    Returns:
        Images and labels of the same shapes and dtypes; unchanged where both alphas are 0.

    Raises:
        ValueError: for an unknown mode or a value out of range.

    Source: Zhang et al., mixup, arXiv 1710.09412; Yun et al., CutMix, arXiv 1905.04899; partners and modes as
    in timm.
    """
    for name, alpha in (("mixup_alpha", mixup_alpha), ("cutmix_alpha", cutmix_alpha)):
        if alpha < 0:
            raise ValueError(f"{name}: expected at least 0, got {alpha}")
    for name, share in (("prob", prob), ("switch_prob", switch_prob)):
        if not 0 <= share <= 1:
            raise ValueError(f"{name}: expected a probability from 0 to 1, got {share}")
    if mode not in MIX_MODES:
        raise ValueError(f"mode: unknown mode {mode!r}{nearest(mode, MIX_MODES)}")
    if mixup_alpha == cutmix_alpha == 0:
        return images, labels

    batch, height, width, _ = images.shape
    draws = {"batch": 1, "pair": (batch + 1) // 2, "elem": batch}[mode]
    keys = jax.random.split(key, 5)
    if mixup_alpha and cutmix_alpha:
        cutmix = jax.random.uniform(keys[0], (draws, 1), jnp.float32) < switch_prob
    else:
        cutmix = jnp.full((draws, 1), bool(cutmix_alpha))
    alpha = jnp.where(cutmix, jnp.float32(cutmix_alpha), jnp.float32(mixup_alpha))
    lam = jax.random.beta(keys[1], alpha, alpha, dtype=jnp.float32)
    lam = jnp.where(jax.random.uniform(keys[2], (draws, 1), jnp.float32) < prob, lam, 1.0)
    center_y = jax.random.randint(keys[3], (draws, 1), 0, height)
    center_x = jax.random.randint(keys[4], (draws, 1), 0, width)
    box = _cutmix_box(lam, center_y, center_x, height, width)
    lam = jnp.where(cutmix, _share_left(box, height, width), lam)
    if mode == "pair":
        lam, cutmix, *box = (jnp.concatenate([x, x[: batch // 2][::-1]]) for x in (lam, cutmix, *box))

    # One weight per pixel says both: lambda everywhere for mixup, 0 in the box and 1 around it for cutmix.
    outside = ~_box_mask(*box, height, width)
    weight = jnp.where(cutmix[:, :, None, None], outside, lam[:, :, None, None])
    images = (images * weight + images[::-1] * (1 - weight)).astype(images.dtype)
    labels = (labels * lam + labels[::-1] * (1 - lam)).astype(labels.dtype)
    return images, labels


def _cutmix_box(lam, center_y, center_x, height: int, width: int):
    """The box's top, left, bottom and right, clipped by the image."""
    side = jnp.sqrt(1 - lam)
    h, w = (height * side).astype(jnp.int32), (width * side).astype(jnp.int32)
    y0, x0 = jnp.maximum(center_y - h // 2, 0), jnp.maximum(center_x - w // 2, 0)
    y1, x1 = jnp.minimum(center_y + (h + 1) // 2, height), jnp.minimum(center_x + (w + 1) // 2, width)
    return y0, x0, y1, x1


def _share_left(box, height: int, width: int):
    y0, x0, y1, x1 = box
    return 1 - (y1 - y0) * (x1 - x0) / (height * width)
