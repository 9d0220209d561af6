"""The two streams that AHAN has beside its backbone: what parts of a face look at, and where its halves differ."""

import functools

import flax.linen as nn
import jax.numpy as jnp
from jax.nn import initializers
from jaxtyping import Array, Float

from kernels.cross import asymmetry_signature, bilateral_attention, mix_scales, part_attention, pool_parts, roi_align
from kernels.dense import accumulator_dtype
from zoo.layers import Dtype, Linear, exact_gelu, normal02_init
from zoo.part_maps import AsymmetryMap, PartMap
from zoo.vit_blocks import Norm
from zoo.watch import watched

SHARINGS = ("none", "scales", "regions", "all")
LAYOUTS = ("attention", "projections", "block")


class GroupedLinear(nn.Module):
    """A linear layer for every group; `kernel` is `(groups, C, features)`, `bias` `(groups, features)`."""

    groups: int
    features: int
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B G n C"] | Float[Array, "B n C"]) -> Float[Array, "B groups n D"]:
        """Of tokens that are each group's own, or the same for all groups."""
        kernel = self.param("kernel", normal02_init, (self.groups, x.shape[-1], self.features), self.param_dtype)
        bias = self.param("bias", initializers.zeros, (self.groups, self.features), self.param_dtype)
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        own = "g" if x.ndim == 4 else ""
        return jnp.einsum(f"b{own}nc,gcd->bgnd", x, kernel) + bias[:, None]


class GroupedNorm(nn.Module):
    """A layer norm with a scale and a bias for every group, both `(groups, C)`."""

    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B G n C"]) -> Float[Array, "B G n C"]:
        shape = (x.shape[1], x.shape[-1])
        scale = self.param("scale", initializers.ones, shape, self.param_dtype)
        bias = self.param("bias", initializers.zeros, shape, self.param_dtype)
        x = Norm(use_scale=False, use_bias=False, dtype=self.dtype)(x)
        return x * scale[:, None].astype(x.dtype) + bias[:, None].astype(x.dtype)


class CrossAttention(nn.Module):
    """Tokens of groups ask all tokens of their image, every group with its own projections.

    Attributes:
        num_heads: divides the channels.
        layout: `"attention"`: projections of query, key, value and output; `"projections"`: none of the output;
            `"block"`: a whole encoder block, with shortcuts and an MLP.
    """

    num_heads: int
    layout: str
    mlp_ratio: float = 4.0
    implementation: str | tuple[str, ...] | None = None
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, parts: Float[Array, "B G n C"], tokens: Float[Array, "B N C"], return_weights: bool = False
    ) -> tuple[Float[Array, "B G n C"], Float[Array, "B G heads n N"] | None]:
        """What the groups found, and the weights or None."""
        like = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        groups, c = parts.shape[1], parts.shape[-1]
        linear = functools.partial(GroupedLinear, groups, **like)
        if self.layout == "block":
            normed = GroupedNorm(name="norm1", **like)(parts)
        else:
            # What comes next is linear and would take up a scale and a bias.
            normed = Norm(use_scale=False, use_bias=False, dtype=self.dtype)(parts)
        operands = linear(c, name="query")(normed), linear(c, name="key")(tokens), linear(c, name="value")(tokens)
        found = part_attention(
            *(x.reshape(*x.shape[:-1], self.num_heads, -1) for x in operands),
            implementation="xla" if return_weights else self.implementation,
            return_weights=return_weights,
        )
        out, weights = found if return_weights else (found, None)
        out = out.reshape(parts.shape)
        if self.layout != "projections":
            out = linear(c, name="proj")(out)
        if self.layout == "block":
            out = parts + out
            hidden = linear(int(self.mlp_ratio * c), name="fc1")(GroupedNorm(name="norm2", **like)(out))
            out = out + linear(c, name="fc2")(exact_gelu(hidden))
        return out, weights


class HierarchicalCrossAttention(nn.Module):
    """HCA: regions of the face, each at several scales, ask all tokens; their scales are mixed by learned weights.

    A region is resampled to a square of cells, which its scales pool. Of what its queries find at a scale the mean
    over the queries is taken, and of these means, one for each scale, a sum whose weights the region learns.

    Attributes:
        regions: how many there are.
        scales: sides of the squares of cells that become one query.
        cells: side of a region's square in cells, which all scales divide.
        sampling_ratio: samples of a cell along each side.
        num_heads: divides the channels.
        sharing: what has its projections in common: `"none"`: every region at every scale has its own; `"scales"`:
            the scales of a region; `"regions"`: the regions at a scale; `"all"`.
        layout: of every cross-attention, see `CrossAttention`.
    """

    regions: int
    scales: tuple[int, ...]
    cells: int
    sampling_ratio: int
    num_heads: int
    sharing: str
    layout: str
    mlp_ratio: float = 4.0
    implementation: str | tuple[str, ...] | None = None
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, features: Float[Array, "B h w C"], tokens: Float[Array, "B N C"], boxes: Float[Array, "B R 4"]
    ) -> Float[Array, "B RC"]:
        """The regions' vectors behind one another.

        Args:
            features: the map that regions are cut out of.
            tokens: what they ask; the map's are the last of them.
            boxes: (left, top, right, bottom) of every region, from 0 to 1.
        """
        cut = roi_align(features, boxes, (self.cells, self.cells), self.sampling_ratio)
        queries = [pool_parts(cut, scale) for scale in self.scales]
        if self.sharing in ("scales", "all"):
            attend = self._cross_attention("scales")
            lengths = [query.shape[2] for query in queries]
            found = self._ask(attend, jnp.concatenate(queries, axis=2), tokens)
            # Queries do not see one another: those of all scales can go in together.
            ends = [sum(lengths[: i + 1]) for i in range(len(lengths) - 1)]
            outs, seen = jnp.split(found[0], ends, axis=2), jnp.split(found[1], ends, axis=2)
        else:
            attends = [self._cross_attention(f"x{scale}") for scale in self.scales]
            outs, seen = zip(*(self._ask(attend, query, tokens) for attend, query in zip(attends, queries)))
        logits = self.param("scale_logits", initializers.zeros, (self.regions, len(self.scales)), self.param_dtype)
        wide = accumulator_dtype(features.dtype)
        mixed, mixing = mix_scales([out.mean(2, dtype=wide).astype(out.dtype) for out in outs], logits)
        if watched(self):
            heat = jnp.stack([weights.mean(2) for weights in seen], axis=2)
            b, h, w, _ = features.shape
            heat = heat[..., -h * w :].reshape(b, self.regions, len(self.scales), h, w)
            self.sow("attention", "map", PartMap(heat, mixing, boxes))
        return mixed.reshape(mixed.shape[0], -1)

    def _cross_attention(self, name: str) -> CrossAttention:
        return CrossAttention(
            num_heads=self.num_heads,
            layout=self.layout,
            mlp_ratio=self.mlp_ratio,
            implementation=self.implementation,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name=name,
        )

    def _ask(self, attend: CrossAttention, queries, tokens):
        """What queries `(B, R, n, C)` found, and what they looked at, `(B, R, n, N)`: no keys unless watched."""
        b, r, n, c = queries.shape
        # Regions with the same projections are one group of more queries.
        together = self.sharing in ("regions", "all")
        groups = queries.reshape(b, 1, r * n, c) if together else queries
        out, weights = attend(groups, tokens, watched(self))
        seen = jnp.zeros((b, r, n, 0)) if weights is None else weights.mean(2).reshape(b, r, n, -1)
        return out.reshape(queries.shape), seen


class FacialAsymmetry(nn.Module):
    """FAAM: the halves of the face ask each other; the mean absolute difference of the answers is the signature.

    Attributes:
        num_heads: divides the channels.
        shared: whether both directions have the same projections, without which the signature of a symmetric map is
            not zero.
        layout: `"attention"` or `"projections"`, see `CrossAttention`.
    """

    num_heads: int
    shared: bool = True
    layout: str = "attention"
    implementation: str | tuple[str, ...] | None = None
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, features: Float[Array, "B h w C"]) -> Float[Array, "B C"]:
        """The signature of a map whose halves are those of the face; an odd width is a `ValueError`."""
        c, half = features.shape[-1], features.shape[2] // 2

        def linear(name, x):
            return Linear(c, name=name, dtype=self.dtype, param_dtype=self.param_dtype)(x)

        def project(name, on_left, on_right):
            """Over the whole map, where each half has the projection of the direction that reads it."""
            if self.shared:
                return linear(name, features)
            halves = ((on_left, features[:, :, :half]), (on_right, features[:, :, half:]))
            return jnp.concatenate([linear(f"{name}_{side}", x) for side, x in halves], axis=2)

        query, key, value = (
            project(name, *sides).reshape(*features.shape[:3], self.num_heads, -1)
            for name, sides in (("query", ("left", "right")), ("key", ("right", "left")), ("value", ("right", "left")))
        )
        found = bilateral_attention(query, key, value, implementation=self.implementation)
        left, right = (x.reshape(*x.shape[:3], c) for x in found)
        if self.layout != "projections":
            if self.shared:
                # Beside one another: along the batch, examples would move between devices.
                left, right = jnp.split(linear("proj", jnp.concatenate([left, right], axis=2)), 2, axis=2)
            else:
                left, right = linear("proj_left", left), linear("proj_right", right)
        if watched(self):
            wide = accumulator_dtype(left.dtype)
            self.sow("attention", "map", AsymmetryMap(abs(left.astype(wide) - right.astype(wide)).mean(-1)))
        return asymmetry_signature(left, right)
