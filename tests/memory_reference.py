"""Miras written down once more, slowly: every state of every token in float64, with autodiff inner gradients.

A state is what the paper writes: the weights W, or A where W is a normalised A. Nothing of `kernels` is used.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

EPSILON = 1e-6


def memory(kind, weights, x):
    """One head's M(x)."""
    if kind == "vector":
        return weights["w"] * x
    if kind == "matrix":
        return weights["w"] @ x
    z = weights["w1"] @ jax.nn.gelu(weights["w2"] @ x, approximate=True)
    return x + (z - z.mean()) / jnp.sqrt(z.var() + EPSILON)


def loss(bias, output, value, threshold):
    """The bias at one token, for autodiff."""
    r = output - value
    size = jnp.sqrt((r**2).sum())
    absolute = jnp.sqrt(r**2 + EPSILON)
    delta = threshold[0]
    return {
        "dot": lambda: -output @ value,
        "l2": lambda: (r**2).sum() / 2,
        "lp": lambda: (absolute**3).sum(),
        "l1": lambda: absolute.sum(),
        "huber_norm": lambda: jnp.where(size <= delta, size**2 / 2, delta * (size - delta / 2)),
        "huber_coord": lambda: jnp.where(
            abs(r) <= threshold, r**2 / 2, threshold * (abs(r) - threshold / 2)
        ).sum(),
        "huber_switch": lambda: jnp.where(size <= delta, size**2 / 2, delta * absolute.sum()),
        "shift_robust": lambda: (r**2).sum() / 2 + delta * jnp.sqrt((r**2).sum() + EPSILON),
    }[bias]()  # fmt: skip


@functools.cache
def gradient(kind, bias):
    """A function of weights, keys, values and thresholds, of every sample and head one."""

    def one(weights, key, value, threshold):
        return jax.grad(lambda w: loss(bias, memory(kind, w, key), value, threshold))(weights)

    return jax.jit(jax.vmap(jax.vmap(one)))


@functools.cache
def reader(kind):
    return jax.jit(jax.vmap(jax.vmap(functools.partial(memory, kind))))


def softmax(z, axes):
    z = np.exp(z - z.max(axes, keepdims=True))
    return z / z.sum(axes, keepdims=True)


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def on(gate, name, w):
    """A gate `(B, H, 1 or D)` on the D-sized axis of the weight `name`, `(B, H, ...)`."""
    if w.ndim == 3:
        return gate
    return gate[..., :, None] if name == "w1" else gate[..., None, :]


class Gate:
    """How a state starts, moves, and becomes weights; the base is l2 decay."""

    def start(self, name, w):
        return w

    def weights(self, name, state, anchor):
        return state

    def move(self, name, state, alpha, eta, gradient):
        return on(alpha, name, state) * state - on(eta, name, state) * gradient

    def open(self, name, state, alpha, eta, gradient):
        """The first token of a chunk: the state after it, and whether the chunk's other gradients are taken there."""
        return self.move(name, state, alpha, eta, gradient), False


class Simplex(Gate):
    """W = total softmax(alpha log W - eta gradient), on `axes[name]`, counted from the end."""

    def __init__(self, axes, total=None, linear=False):
        self.axes, self.sum, self.linear = axes, total, linear

    def total(self, name, w):
        return np.prod([w.shape[a] for a in self.axes[name]]) if self.sum is None else self.sum

    def start(self, name, w):
        return self.total(name, w) * softmax(w, self.axes[name])

    def alpha(self, name, alpha, w):
        gated = -2 if name == "w1" else -1
        return alpha.mean(-1, keepdims=True) if gated in self.axes[name] else alpha

    def exact(self, name, state, alpha, eta, gradient):
        logits = on(self.alpha(name, alpha, state), name, state) * np.log(state) - on(eta, name, state) * gradient
        return self.total(name, state) * softmax(logits, self.axes[name])

    def move(self, name, state, alpha, eta, gradient):
        if not self.linear:
            return self.exact(name, state, alpha, eta, gradient)
        return super().move(name, state, self.alpha(name, alpha, state), eta, gradient)

    def open(self, name, state, alpha, eta, gradient):
        mean = self.total(name, state) / np.prod([state.shape[a] for a in self.axes[name]])
        floor = 1e-6 * mean if self.linear else 0
        return self.exact(name, np.maximum(state, floor), alpha, eta, gradient), self.linear


class Lq(Gate):
    def __init__(self, q=4.0, link="paper", own_norm=False):
        self.q, self.link, self.own_norm = q, link, own_norm

    def norm(self, a):
        return (np.abs(a) ** self.q).sum(tuple(range(2, a.ndim)), keepdims=True) ** (1 / self.q)

    def weights(self, name, state, anchor):
        if self.link == "identity":
            return state
        if self.link == "dual":
            return np.sign(state) * np.abs(state) ** (self.q - 1) / self.norm(state) ** (self.q - 2)
        return state / self.norm(state if self.own_norm else anchor) ** (self.q - 2)


class Sigmoid(Gate):
    def start(self, name, w):
        return sigmoid(w)

    def move(self, name, state, alpha, eta, gradient):
        logit = np.log(state / (1 - state))
        return sigmoid(super().move(name, logit, alpha, eta, 0) - on(eta, name, state) * gradient)


class ElasticNet(Gate):
    """In the paper's symbols."""

    def __init__(self, alpha, beta):
        self.alpha, self.beta = alpha, beta

    def move(self, name, state, alpha, eta, gradient):
        eta = on(eta, name, state)
        shrink = self.beta / (self.beta + eta)
        gamma = eta * self.beta / (self.alpha * (eta + self.beta))
        z = shrink * state - eta * shrink * gradient
        return np.sign(z) * np.maximum(np.abs(z) - gamma, 0)


class Leader(Gate):
    """The elastic net of a regularised leader."""

    def __init__(self, gamma):
        self.gamma = gamma

    def weights(self, name, state, anchor):
        return np.sign(state) * np.maximum(np.abs(state) - self.gamma, 0)


def run(kind, bias, gate, query, key, value, weights, *, step, log_retention=None, threshold=None, log_momentum=None,
        chunk_size=1, starts=None, read="after", decay_first=False):  # fmt: skip
    """Outputs `(B, N, H, E)` and the state after the last token; gates are `(B, N, H)` or with channels.

    Gradients of a chunk are taken at the weights of its start, and where a document starts, at the initial ones.
    """
    b, n, h, _ = query.shape
    zeros, ones = np.zeros((b, n, h)), np.ones((b, n, h))
    gates = [step, zeros if log_retention is None else log_retention, ones if threshold is None else threshold]
    step, log_retention, threshold = (np.asarray(g)[..., None] if np.ndim(g) == 3 else np.asarray(g) for g in gates)
    if log_momentum is not None:
        log_momentum = log_momentum[..., None] if np.ndim(log_momentum) == 3 else np.asarray(log_momentum)
    fresh = {k: np.broadcast_to(gate.start(k, np.asarray(w)[None]), (b, *w.shape)) for k, w in weights.items()}
    anchor = state = fresh
    velocity = {k: np.zeros_like(w) for k, w in fresh.items()}
    outputs = []
    for t in range(n):
        opens = t % chunk_size == 0
        anchor = state if opens else anchor
        if starts is not None:
            anchor, state, velocity = (
                {k: np.where(starts[:, t].reshape(-1, *[1] * (w.ndim - 1)), new[k], w) for k, w in old.items()}
                for old, new in ((anchor, fresh), (state, fresh), (velocity, {k: 0.0 for k in fresh}))
            )
        alpha, eta = np.exp(log_retention[:, t]), step[:, t]
        inner = {k: gate.weights(k, w, w) for k, w in anchor.items()}
        if decay_first:
            inner = {k: on(alpha, k, w) * w for k, w in inner.items()}
        gradients = gradient(kind, bias)(inner, key[:, t], value[:, t], threshold[:, t])
        gradients = {k: np.asarray(g) for k, g in gradients.items()}
        before, state, taken = state, dict(state), anchor
        for k, w in before.items():
            if log_momentum is not None:
                velocity[k] = on(np.exp(log_momentum[:, t]), k, w) * velocity[k] - on(eta, k, w) * gradients[k]
                state[k] = gate.move(k, w, alpha, eta, 0 * w) + velocity[k]
            elif opens:
                state[k], lags = gate.open(k, w, alpha, eta, gradients[k])
                taken = {**taken, k: state[k]} if lags else taken
            else:
                state[k] = gate.move(k, w, alpha, eta, gradients[k])
        anchor = taken
        seen = state if read == "after" else before
        outputs.append(
            np.asarray(reader(kind)({k: gate.weights(k, w, anchor[k]) for k, w in seen.items()}, query[:, t]))
        )
    return np.stack(outputs, 1), state
