"""timm's implementation of a model, eager and compiled, where it is installed, to be timed beside ours."""

import functools
import importlib
import importlib.util
import os
import time
from typing import Any

import jax
import numpy as np

from kernels.bench import peers as bench_peers
from kernels.bench.rows import Row
from kernels.bench.timing import Timed
from train.model_steps import SETS, Peer

MODULES = ("timm", "torch")
# Families of the zoo whose models have timm's names and are built as timm builds them.
FAMILIES = ("davit_", "maxvit_", "vit_", "deit_", "deit3_")
EAGER, COMPILED = "timm eager", "timm compiled"
# No optimizer may change a weight by much while it is timed.
LEARNING_RATE = 1e-6


def versions() -> dict[str, str]:
    """Of timm and torch, or that they are not installed."""
    return bench_peers.versions(dict(zip(MODULES, MODULES)))


def peers(name: str, batch: int, dtype: str) -> list[Peer]:
    """timm's model of this name, or why there is none; empty for families and sizes that timm does not have.

    Args:
        name: of the model.
        batch: images.
        dtype: float32 with products of full precision, or bfloat16 by autocast over float32 parameters.
    """
    if not name.startswith(FAMILIES) or name.endswith("_nano"):
        return []
    absent = _absent(name)
    return [
        Peer(kind, functools.partial(_start, name, batch, dtype, kind == COMPILED), absent)
        for kind in (EAGER, COMPILED)
    ]


def _absent(name: str) -> str | None:
    for module in MODULES:
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed"
    if not importlib.import_module("timm").is_model(name):
        return "timm has no such variant"
    torch = importlib.import_module("torch")
    device, ours = "cuda" if torch.cuda.is_available() else "cpu", jax.default_backend()
    if (device == "cuda") != (ours == "gpu"):
        return f"this torch runs on the {device}, jax on the {ours}"
    return None


def _start(name: str, batch: int, dtype: str, is_compiled: bool, direction: str, row: Row) -> Timed:
    torch, timm = importlib.import_module("torch"), importlib.import_module("timm")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if hasattr(os, "sched_getaffinity"):
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    begin = time.perf_counter()
    made = timm.create_model(name, pretrained=False).to(device, memory_format=torch.channels_last)
    size = made.pretrained_cfg["input_size"]
    row.parameters = sum(x.numel() for x in made.parameters())
    sets = []
    for seed in range(SETS):
        rng = np.random.default_rng(seed)
        images = torch.from_numpy(rng.standard_normal((batch, *size), np.float32)).to(device)
        labels = torch.from_numpy(rng.integers(made.num_classes, size=batch)).to(device)
        sets.append((images.contiguous(memory_format=torch.channels_last), labels))
    called = torch.compile(made) if is_compiled else made
    cast = functools.partial(torch.autocast, device, torch.bfloat16, enabled=dtype == "bfloat16")
    call = _inference(torch, made, called, cast) if direction == "inference" else _training(torch, made, called, cast)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    call(*sets[0])
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    row.compile_s = time.perf_counter() - begin
    if device == "cuda":
        row.peak_bytes = torch.cuda.max_memory_allocated()
    return Timed(lambda i: call(*sets[i]), SETS, wait=lambda out: wait())


def _inference(torch: Any, made: Any, called: Any, cast: Any) -> Any:
    made.eval()

    def infer(images, labels):
        with torch.inference_mode(), cast():
            return called(images)

    return infer


def _training(torch: Any, made: Any, called: Any, cast: Any) -> Any:
    made.train()
    optimizer = torch.optim.AdamW(made.parameters(), lr=LEARNING_RATE, weight_decay=0.05)

    def step(images, labels):
        with cast():
            loss = torch.nn.functional.cross_entropy(called(images), labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(made.parameters(), 1.0)
        optimizer.step()
        return loss

    return step
