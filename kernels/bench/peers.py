"""Other people's implementations, timed beside ours where they are installed. The only file that may import them."""

import dataclasses
import functools
import importlib
import importlib.metadata
import importlib.util
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels import merge_windows, partition_windows
from kernels.bench.case import Case
from kernels.bench.programs import Program
from kernels.bench.timing import Timed

# Module -> what it is installed as.
MODULES = {"tokamax": "tokamax", "torch": "torch", "fla": "flash-linear-attention"}


@dataclasses.dataclass(frozen=True)
class Peer:
    """Someone's implementation of some of the cases.

    Attributes:
        name: in tables.
        module: what has to be installed, None for what jax brings along.
        platforms: as in `kernels.dispatch.PLATFORMS`.
        compiled: `compiled(case, dtype, direction, name)` gives what `Program` is, or raises NotImplementedError.
        serves: whether it has anything for a case.
    """

    name: str
    module: str | None
    platforms: tuple[str, ...]
    compiled: Callable[[Case, str, str, str], Any]
    serves: Callable[[Case], bool]


def versions(modules: Mapping[str, str] = MODULES) -> dict[str, str]:
    """Every peer's version, or that it is not installed; `modules` are the packages by what is imported."""
    found = {}
    for module, package in modules.items():
        try:
            present = importlib.util.find_spec(module) is not None
            found[module] = importlib.metadata.version(package) if present else "not installed, not measured"
        except importlib.metadata.PackageNotFoundError:
            found[module] = "unknown version"
    return found


def peers_of(case: Case) -> Iterator[Peer]:
    """The installed peers that have something for a case."""
    for peer in PEERS:
        if peer.serves(case) and (peer.module is None or importlib.util.find_spec(peer.module) is not None):
            yield peer


def _causal(case: Case) -> bool:
    return case.pattern.endswith(" causal")


def _is_dense(case: Case) -> bool:
    return case.op == "attention"


def _differentiated(case: Case, forward: Callable[..., Any], direction: str) -> Callable[..., Any]:
    """As `Case.function`, of another function."""
    return dataclasses.replace(case, run=lambda implementation, **arrays: forward(**arrays)).function(direction, "peer")


def _windows_by_cudnn(case: Case, dtype: str, direction: str, name: str) -> Program:
    """The windows cut out, dense attention in each by cuDNN, and put together again."""
    if direction != "forward":
        raise NotImplementedError("cuDNN has no backward pass for an odd number of tokens")
    batch, side, _, channels = case.operands["qkv"].shape
    biased = "bias" in case.operands
    tokens = _window_tokens(case)
    size = (round(tokens**0.5),) * 2
    partition = "grid" if case.variant.startswith("grid") else "block"
    # Heads have 32 channels in every case.
    heads = channels // 3 // 32

    def forward(qkv, bias=None):
        windows = partition_windows(qkv, size, partition)
        query, key, value = jnp.moveaxis(windows.reshape(-1, tokens, 3, heads, 32), 2, 0)
        out = jax.nn.dot_product_attention(
            query, key, value, bias=bias[None] if biased else None, implementation="cudnn"
        )
        return merge_windows(out.reshape(-1, tokens, channels // 3), (side, side), size, partition)

    return Program(case, dtype, direction, _differentiated(case, forward, direction), name)


def _window_tokens(case: Case) -> int:
    side = int(case.shape.partition(" windows of ")[2].partition("x")[0])
    return side * side


def _tokamax(case: Case, dtype: str, direction: str, name: str) -> Program:
    attention = importlib.import_module("tokamax").dot_product_attention
    forward = functools.partial(attention, is_causal=_causal(case))
    return Program(case, dtype, direction, _differentiated(case, forward, direction), name)


class TorchProgram:
    """As `Program`, of a function of torch tensors."""

    residual_bytes = None
    uses: tuple[Any, ...] = ()

    def __init__(self, case: Case, dtype: str, direction: str, name: str, make: Callable[[Case, Any], Any]):
        self.torch = importlib.import_module("torch")
        self.case, self.direction = case, direction
        self.device = "cuda" if self.torch.cuda.is_available() else "cpu"
        if (self.device == "cuda") != (jax.default_backend() == "gpu"):
            raise NotImplementedError(f"this torch runs on the {self.device}, jax on the {jax.default_backend()}")
        begin = time.perf_counter()
        self.forward = make(case, self.torch)
        self.compile_s = time.perf_counter() - begin
        self.peak_bytes: int | None = None

    def tensors(self, tree: Any) -> Any:
        def tensor(x):
            made = self.torch.from_numpy(np.array(x, np.float32)).to(self.device)
            return made.to(getattr(self.torch, str(x.dtype)))

        return jax.tree.map(tensor, tree)

    def run(self, arrays: Mapping[str, Any], cotangent: Any) -> tuple[Any, dict[str, Any]]:
        if self.direction == "forward":
            with self.torch.no_grad():
                return self.forward(**arrays), {}
        arrays = {name: x.detach().requires_grad_() for name, x in arrays.items()}
        out = self.forward(**arrays)
        return out.detach(), dict(zip(arrays, self.torch.autograd.grad(out, list(arrays.values()), cotangent)))

    def __call__(self, arrays: Mapping[str, jax.Array], cotangent: Any) -> tuple[Any, dict[str, Any]]:
        if self.device == "cuda":
            self.torch.cuda.reset_peak_memory_stats()
        found = self.run(self.tensors(dict(arrays)), self.tensors(cotangent))
        if self.device == "cuda":
            self.peak_bytes = self.torch.cuda.max_memory_allocated()
        return jax.tree.map(lambda x: jnp.asarray(x.float().cpu().numpy()), found)

    def timed(self, sets: Sequence[tuple[Mapping[str, jax.Array], Any]]) -> Timed:
        on_device = [(self.tensors(dict(arrays)), self.tensors(cotangent)) for arrays, cotangent in sets]
        wait = self.torch.cuda.synchronize if self.device == "cuda" else lambda: None
        return Timed(lambda i: self.run(*on_device[i]), len(sets), wait=lambda out: wait())


def _torch_sdpa(case: Case, torch: Any) -> Callable[..., Any]:
    def forward(query, key, value):
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=_causal(case))
        return out.transpose(1, 2)

    return forward


def _torch_flex(case: Case, torch: Any) -> Callable[..., Any]:
    flex = importlib.import_module("torch.nn.attention.flex_attention")
    attention = torch.compile(flex.flex_attention)
    mask = None
    if _causal(case):
        tokens = case.operands["query"].shape[1]
        mask = flex.create_block_mask(lambda b, h, q, k: q >= k, None, None, tokens, tokens, device="cuda")

    def forward(query, key, value):
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        return attention(query, key, value, block_mask=mask).transpose(1, 2)

    return forward


# Variant -> module of fla.ops, function, and by what names it takes our operands that it calls otherwise.
FLA = {
    "simple GLA": ("simple_gla", "chunk_simple_gla", {"log_decay": "g"}),
    "GLA": ("gla", "chunk_gla", {"log_decay": "g"}),
    "delta": ("delta_rule", "chunk_delta_rule", {}),
    "gated delta": ("gated_delta_rule", "chunk_gated_delta_rule", {"log_decay": "g"}),
}


def _fla(case: Case, torch: Any) -> Callable[..., Any]:
    module, function, renamed = FLA[case.variant]
    run = getattr(importlib.import_module(f"fla.ops.{module}"), function)
    names = {"query": "q", "key": "k", "value": "v"} | renamed

    def forward(**arrays):
        return run(**{names.get(name, name): x for name, x in arrays.items()})[0]

    return forward


def _by_torch(make):
    return lambda case, dtype, direction, name: TorchProgram(case, dtype, direction, name, make)


PEERS = (
    Peer("jax.nn cudnn", None, ("cuda",), _windows_by_cudnn, lambda case: case.op == "window_attention"),
    Peer("tokamax", "tokamax", ("cuda", "tpu"), _tokamax, _is_dense),
    Peer("torch sdpa", "torch", ("cpu", "cuda", "rocm"), _by_torch(_torch_sdpa), _is_dense),
    Peer("torch flex", "torch", ("cuda",), _by_torch(_torch_flex), _is_dense),
    Peer("fla", "fla", ("cuda",), _by_torch(_fla), lambda case: case.variant in FLA),
)
