"""What `kernels.memory.miras` refuses, and says of it."""

import jax

from kernels.chunks import check_segments
from kernels.memory.options import check_name

FORMS = ("chunk", "recurrent", "materialized")


def check_operands(
    query,
    key,
    value,
    weights,
    step,
    log_retention,
    threshold,
    log_momentum,
    segments,
    initial_state,
    *,
    rule,
    chunk_size,
    form,
    return_state,
):
    """Raises ValueError for operands that do not fit together or the rule."""
    check_name("form", form, FORMS)
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    b, n, h, d = query.shape
    e = value.shape[-1]
    if n < 1:
        raise ValueError(f"query must have at least one token, got {query.shape}")
    if key.shape != query.shape:
        raise ValueError(f"key must have the shape of query, which is {query.shape}; got {key.shape}")
    if value.shape[:3] != query.shape[:3]:
        raise ValueError(f"value must be (B, N, H, E) with B, N and H of query, {query.shape[:3]}; got {value.shape}")
    kind = type(rule.memory).__name__
    if kind != "Matrix" and e != d:
        raise ValueError(f"memory {kind} maps D channels to D: value must have {d} channels, got {value.shape}")
    _check_weights(weights, rule.memory, h, d, e)
    _check_gate("step", step, (b, n, h), d)
    decays, gate = rule.retention.decays, rule.retention
    _check_use("log_retention", log_retention, decays != "refused", decays == "required", f"retention {gate}")
    _check_use("threshold", threshold, *[rule.bias.threshold is not None] * 2, f"bias {rule.bias}")
    momentum = rule.algorithm == "momentum"
    _check_use("log_momentum", log_momentum, momentum, momentum, f"algorithm {rule.algorithm!r}")
    _check_gate("log_retention", log_retention, (b, n, h), d)
    _check_gate("threshold", threshold, (b, n, h), e if rule.bias.threshold == "channel" else None)
    _check_gate("log_momentum", log_momentum, (b, n, h), d)
    check_segments(segments, b, n)
    if initial_state is not None:
        _check_state(initial_state, weights, b, momentum)


def _check_weights(weights, memory, h, d, e):
    expected = memory.shapes(h, d, e)
    if set(weights) != set(expected):
        raise ValueError(
            f"weights of memory {type(memory).__name__} are {', '.join(map(repr, expected))}; "
            f"got {', '.join(map(repr, weights)) or 'none'}"
        )
    sizes = {}
    for name, shape in expected.items():
        given = weights[name].shape
        fits = len(given) == len(shape)
        for axis, want in zip(given, shape):
            fits = fits and axis == (sizes.setdefault(want, axis) if isinstance(want, str) else want)
        if not fits:
            wanted = ", ".join(str(sizes.get(size, size)) for size in shape)
            raise ValueError(f"weights[{name!r}] must be ({wanted}), heads first; got {given}")


def _check_use(name, given, usable, needed, by):
    if given is None and needed:
        raise ValueError(f"{by} needs {name}, got None")
    if given is not None and not usable:
        raise ValueError(f"{by} takes no {name}, got one of shape {given.shape}; leave it None")


def _check_gate(name, given, shape, channels):
    if given is None or given.shape == shape or (channels is not None and given.shape == (*shape, channels)):
        return
    wanted = f"(B, N, H) = {shape}" + (f" or with {channels} channels" if channels is not None else "")
    raise ValueError(f"{name} must be {wanted}; got {given.shape}")


def _check_state(state, weights, b, momentum):
    wanted = {name: (b, *w.shape) for name, w in weights.items()}
    for part in ("anchor", "running", *(["velocity"] if momentum else [])):
        leaves = getattr(state, part)
        given = None if leaves is None else jax.tree.map(lambda x: x.shape, leaves)
        if given != wanted:
            raise ValueError(f"initial_state.{part} must have the shapes {wanted}, got {given}")
    if not momentum and state.velocity is not None:
        raise ValueError("initial_state.velocity must be None for algorithm 'gradient'")
    if state.position.shape != (b,):
        raise ValueError(f"initial_state.position must be (B,) = {(b,)}, got {state.position.shape}")
