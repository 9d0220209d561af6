"""What one execution of a primitive costs, by the primitive's name.

Elementwise work is one operation for every element of the result, as in XLA; functions that XLA's backends expand
into polynomials (erf, erfc, lgamma) count one transcendental whatever they become. Integer and boolean work counts
like floating-point work. Where XLA counts a poor algorithm, a cumulative sum as a window of the whole length, the
work of a good one is counted.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np


@dataclasses.dataclass(frozen=True)
class Counts:
    """Operations, transcendental values, bytes without fusion, and operations in products and convolutions."""

    flops: int = 0
    transcendentals: int = 0
    bytes: int = 0
    matmul_flops: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            self.flops + other.flops,
            self.transcendentals + other.transcendentals,
            self.bytes + other.bytes,
            self.matmul_flops + other.matmul_flops,
        )

    def __mul__(self, times: int) -> "Counts":
        return Counts(self.flops * times, self.transcendentals * times, self.bytes * times, self.matmul_flops * times)


ELEMENTWISE = frozenset(
    """abs add add_any and ceil clamp clz complex conj convert_element_type div eq eq_to floor ge gt imag is_finite
    le le_to lt lt_to max min mul mulhi ne neg nextafter not or population_count real reciprocal
    reduce_precision rem round select_n shift_left shift_right_arithmetic shift_right_logical sign square sub
    xor""".split()
)
# With the operations that come on top for every element.
TRANSCENDENTAL = dict.fromkeys(
    """acos acosh asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt cos cosh digamma erf erf_inv erfc exp
    expm1 igamma igammac lgamma log log1p log2 polygamma pow regularized_incomplete_beta rsqrt sin sinh sqrt tan
    tanh zeta""".split(),
    0,
) | {"exp2": 1, "logistic": 3}
# No operations: data is moved, made or exchanged.
MOVEMENT = frozenset(
    """all_gather all_gather_invariant all_to_all broadcast_in_dim concatenate empty iota pad pbroadcast ppermute
    rev roll split stack tile transpose unstack zeros_like""".split()
)
# Neither operations nor traffic: another view of the same bytes, or nothing that is left at run time.
FREE = frozenset(
    """axis_index bitcast_convert_type copy debug_callback debug_print device_put empty2 layout_constraint name
    optimization_barrier platform_index preduced pvary random_clone random_unwrap random_wrap reduced_vary_cast
    reduced_vary_cast_p reshape reshard sharding_constraint squeeze stop_gradient vary_unreduced_cast
    vary_unreduced_cast_p""".split()
)
# Of the operand they touch what they return, not all: twice the result, and the indices.
SLICES = frozenset(("slice", "dynamic_slice", "gather"))
# In place: the update is read, and what it meets is read and written.
UPDATES = frozenset(
    ("dynamic_update_slice", "scatter", "scatter-add", "scatter-max", "scatter-min", "scatter-mul", "scatter-sub")
)
# Twenty rounds of five operations and some more make two words.
THREEFRY_PER_WORD = 60
# A rejection sampler that nearly always keeps its first proposal: seven keys of two words, a normal, two uniforms.
WORDS_PER_GAMMA = 17


def _size(atom) -> int:
    return math.prod(atom.aval.shape)


def _nbytes(atom) -> int:
    return _size(atom) * atom.aval.dtype.itemsize


def _dot_general(eqn) -> int:
    (lhs_contract, _), _ = eqn.params["dimension_numbers"]
    depth = math.prod(eqn.invars[0].aval.shape[i] for i in lhs_contract)
    return 2 * _size(eqn.outvars[0]) * depth


def _conv_general_dilated(eqn) -> int:
    """As in XLA: products with the padding, or with the holes that a dilation leaves, do not count."""
    lhs, rhs = (v.aval.shape for v in eqn.invars)
    out, p = eqn.outvars[0].aval.shape, eqn.params
    dims = p["dimension_numbers"]
    pairs = lhs[dims.lhs_spec[0]] // p["batch_group_count"] * rhs[dims.rhs_spec[0]] * rhs[dims.rhs_spec[1]]
    for i, ((before, _), stride) in enumerate(zip(p["padding"], p["window_strides"])):
        extent, window = lhs[dims.lhs_spec[2 + i]], rhs[dims.rhs_spec[2 + i]]
        outputs, holes = np.arange(out[dims.out_spec[2 + i]]), p["lhs_dilation"][i]
        at = outputs[:, None] * stride + np.arange(window) * p["rhs_dilation"][i] - before
        pairs *= int(((at >= 0) & (at % holes == 0) & (at // holes < extent)).sum())
    return 2 * pairs


def _integer_pow(eqn) -> int:
    """Repeated squaring, and a division for a negative power."""
    power = abs(eqn.params["y"])
    multiplications = max(power.bit_length() + power.bit_count() - 2, 0)
    return (multiplications + (eqn.params["y"] < 0)) * _size(eqn.outvars[0])


def _reduction(eqn) -> int:
    return _size(eqn.invars[0]) - _size(eqn.outvars[0])


def _general_reduction(eqn) -> int:
    combine = getattr(eqn.params["jaxpr"], "jaxpr", eqn.params["jaxpr"])
    return _reduction(eqn) * len(combine.eqns)


def _window(eqn) -> int:
    return math.prod(eqn.params["window_dimensions"])


def _sort(eqn) -> int:
    operand = eqn.invars[0].aval
    return _size(eqn.invars[0]) * math.ceil(math.log2(max(operand.shape[eqn.params["dimension"]], 1)))


def _fft(eqn) -> int:
    """5 n log2 n for a complex transform of n points, half of it for a real one."""
    lengths = eqn.params["fft_lengths"]
    real = any(v.aval.dtype.kind == "f" for v in (eqn.invars[0], eqn.outvars[0]))
    lines = math.prod(eqn.invars[0].aval.shape[: -len(lengths)])
    points = math.prod(lengths)
    return round(5 * lines * points * math.log2(points)) // (2 if real else 1)


def _random_words(eqn) -> int:
    return THREEFRY_PER_WORD * -(-_nbytes(eqn.outvars[-1]) // 4)


def _over_result(eqn) -> int:
    return _size(eqn.outvars[0])


def _over_operand(eqn) -> int:
    return _size(eqn.invars[0])


def _over_updates(eqn) -> int:
    return _size(eqn.invars[-1])


FLOPS: dict[str, Callable] = {
    "argmax": _reduction,
    "argmin": _reduction,
    "cholesky": lambda eqn: _size(eqn.invars[0]) * eqn.invars[0].aval.shape[-1] // 3,
    "conv_general_dilated": _conv_general_dilated,
    "cumlogsumexp": _over_operand,
    "cummax": _over_operand,
    "cummin": _over_operand,
    "cumprod": _over_operand,
    "cumsum": _over_operand,
    "dot_general": _dot_general,
    "dynamic_slice": lambda eqn: 0,
    "dynamic_update_slice": lambda eqn: 0,
    "fft": _fft,
    "gather": lambda eqn: 0,
    "integer_pow": _integer_pow,
    "one_minus_square": lambda eqn: 3 * _size(eqn.outvars[0]),
    "pmax": _over_result,
    "pmin": _over_result,
    "polynomial": lambda eqn: 2 * (len(eqn.invars) - 2) * _size(eqn.outvars[0]),
    "psum": _over_result,
    "psum_invariant": _over_result,
    "random_bits": _random_words,
    "random_fold_in": _random_words,
    "random_gamma": lambda eqn: WORDS_PER_GAMMA * THREEFRY_PER_WORD * _size(eqn.outvars[0]),
    "random_seed": _random_words,
    "random_split": _random_words,
    "reduce": _general_reduction,
    "reduce_and": _reduction,
    "reduce_max": _reduction,
    "reduce_min": _reduction,
    "reduce_or": _reduction,
    "reduce_prod": _reduction,
    "reduce_scatter": _over_operand,
    "reduce_sum": _reduction,
    "reduce_window_max": lambda eqn: _size(eqn.outvars[0]) * (_window(eqn) - 1),
    "reduce_window_min": lambda eqn: _size(eqn.outvars[0]) * (_window(eqn) - 1),
    "reduce_window_sum": lambda eqn: _size(eqn.outvars[0]) * (_window(eqn) - 1),
    "reduce_xor": _reduction,
    "rng_bit_generator": _random_words,
    "scatter": lambda eqn: 0,
    "scatter-add": _over_updates,
    "scatter-max": _over_updates,
    "scatter-min": _over_updates,
    "scatter-mul": _over_updates,
    "scatter-sub": _over_updates,
    "select_and_gather_add": lambda eqn: _size(eqn.outvars[0]) * (_window(eqn) - 1),
    "select_and_scatter_add": lambda eqn: _size(eqn.invars[0]) * _window(eqn),
    "slice": lambda eqn: 0,
    "sort": _sort,
    "threefry2x32": lambda eqn: THREEFRY_PER_WORD * 2 * _size(eqn.outvars[0]),
    "top_k": lambda eqn: _size(eqn.invars[0]) * math.ceil(math.log2(eqn.params["k"] + 1)),
    "triangular_solve": lambda eqn: _size(eqn.invars[1]) * eqn.invars[0].aval.shape[-1],
}
MATMULS = frozenset(("dot_general", "conv_general_dilated"))


def is_known(eqn) -> bool:
    name = eqn.primitive.name
    return any(name in names for names in (ELEMENTWISE, TRANSCENDENTAL, MOVEMENT, FREE, FLOPS))


def count(eqn) -> Counts:
    """The cost of an equation whose primitive `is_known` and holds no jaxpr to walk."""
    name, results = eqn.primitive.name, eqn.outvars
    if name in FREE or (name == "convert_element_type" and eqn.invars[0].aval.dtype == results[0].aval.dtype):
        return Counts()
    if name in SLICES:
        traffic = 2 * _nbytes(results[0]) + sum(map(_nbytes, eqn.invars[1:]))
    elif name in UPDATES:
        update = eqn.invars[1] if name == "dynamic_update_slice" else eqn.invars[2]
        traffic = 3 * _nbytes(update) + sum(_nbytes(v) for v in eqn.invars[1:] if v is not update)
    else:
        traffic = sum(map(_nbytes, (*eqn.invars, *results)))
    flops = transcendentals = 0
    if name in ELEMENTWISE:
        flops = _size(results[0])
    elif name in TRANSCENDENTAL:
        transcendentals = _size(results[0])
        flops = TRANSCENDENTAL[name] * transcendentals
    elif name in FLOPS:
        flops = FLOPS[name](eqn)
        # A running log-sum-exp: an exp and a log for every element.
        transcendentals = 2 * flops if name == "cumlogsumexp" else 0
    return Counts(flops, transcendentals, traffic, flops if name in MATMULS else 0)
