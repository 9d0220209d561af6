"""The recurrences of `kernels.scan_plan` on GPUs: which sizes are served, and by which kernels."""

from kernels.pallas_gpu import scan, scan_channel, scan_delta
from kernels.pallas_gpu.tiles import CHUNK, widened
from kernels.scan_plan import Backend

LEAST, MOST = 8, 128


def _unsupported(kind, heads, channels, values, dtype):
    for name, size in (("D", channels), ("E", values)):
        if not LEAST <= size <= MOST:
            return f"a head has {name} = {size} channels; the kernel takes {LEAST} to {MOST}"
    return None


def _operands(kind, query, key, value, beta, log_decay, initial_state):
    if kind == "channel":
        log_decay = widened(log_decay, -1)
    query, key, value = (widened(x, -1) for x in (query, key, value))
    return query, key, value, *((beta,) if kind == "delta" else ()), log_decay, widened(initial_state, -2, -1)


def _forward(kind, query, key, value, beta, log_decay, initial_state, *, chunk, scale, keep):
    *operands, initial = _operands(kind, query, key, value, beta, log_decay, initial_state)
    out, final, states = KERNELS[kind].forward(*operands, initial, scale=scale)
    return out[..., : value.shape[-1]], final[..., : key.shape[-1], : value.shape[-1]], states if keep else None


def _backward(kind, query, key, value, beta, log_decay, initial_state, states, d_out, d_final, *, chunk, scale):
    *operands, _ = _operands(kind, query, key, value, beta, log_decay, None)
    d_out, d_final = widened(d_out, -1), widened(d_final, -2, -1)
    made = KERNELS[kind].backward(*operands, states, d_out, d_final, scale=scale)
    d_query, d_key, d_value, d_beta, d_log_decay, d_initial = made
    channels, values = key.shape[-1], value.shape[-1]
    d_query, d_key, d_value = d_query[..., :channels], d_key[..., :channels], d_value[..., :values]
    if kind == "channel":
        d_log_decay = d_log_decay[..., :channels]
    return d_query, d_key, d_value, d_beta, d_log_decay, d_initial[..., :channels, :values]


KERNELS = {"scalar": scan, "channel": scan_channel, "delta": scan_delta}
BACKEND = Backend("pallas_triton", ("cuda",), _forward, _backward, lambda kind, *sizes: CHUNK, _unsupported)
