"""float64 references for the attention primitives, written as loops over what the papers define."""

import numpy as np


def softmax(logits):
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def window_tokens(height, width, window, partition):
    """For every window, the list of its (row, column) positions on a map that divides."""
    (wh, ww), rows, cols = window, height // window[0], width // window[1]
    for i in range(rows):
        for j in range(cols):
            if partition == "block":
                yield [(i * wh + a, j * ww + b) for a in range(wh) for b in range(ww)]
            else:
                yield [(a * rows + i, b * cols + j) for a in range(wh) for b in range(ww)]


def window_attention(qkv, *, num_heads, window, partition="block", bias=None, pad=None, scale=None):
    """Window by window, head by head; `pad` as in the op."""
    qkv = np.asarray(qkv, np.float64)
    b, h, w, c3 = qkv.shape
    c = c3 // 3
    d = c // num_heads
    scale = d**-0.5 if scale is None else scale
    hp, wp = h + -h % window[0], w + -w % window[1]
    full = np.zeros((b, hp, wp, c3))
    if pad is not None and not isinstance(pad, str):
        full[:] = np.asarray(pad, np.float64)
    full[:, :h, :w] = qkv
    out = np.zeros((b, hp, wp, c))
    for tokens in window_tokens(hp, wp, window, partition):
        ys, xs = map(np.array, zip(*tokens))
        keep = (ys < h) & (xs < w) if isinstance(pad, str) else np.ones(len(ys), bool)
        for n in range(b):
            for head in range(num_heads):
                part = full[n, ys, xs]
                q, k, v = (part[:, i * c + head * d : i * c + (head + 1) * d] for i in range(3))
                logits = scale * q @ k.T
                if bias is not None:
                    logits = logits + np.asarray(bias, np.float64)[head]
                logits[:, ~keep] = -np.inf
                out[n, ys, xs, head * d : (head + 1) * d] = softmax(logits) @ v
    return out[:, :h, :w]
