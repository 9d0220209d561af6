"""Images or tokens per second of whole models, inference and training: `python -m kernels.bench --suite models`.

    python -m train.bench_models --ops davit_tiny,vit_small_patch16_224 --size full

Prints one line of JSON on stdout, `{"meta": ..., "rows": [...]}` as `kernels.bench` writes it; progress goes to stderr.
"""

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import ml_collections

from kernels.bench import rows
from kernels.bench.estimate import REASON
from kernels.bench.limits import DATA_SHEET, Limits, limits
from kernels.bench.measure import Effort
from kernels.bench.meta import meta
from kernels.bench.suites import chosen_shapes
from kernels.choices import check_choice, names
from train import commands, model_steps, plan, timm_steps
from zoo import registry
from zoo.sequence.sequence_model import SequenceModel

# One of each family; small: those that a CPU trains, and one that timm has too.
MODELS = {
    "small": (
        *("vit_nano", "davit_nano", "maxvit_nano", "biformer_nano", "care_nano", "dcal_nano", "ahan_nano"),
        *("deit_tiny_patch16_224", "transformer_nano", "gated_deltanet_nano", "yaad_nano", "routing_transformer_nano"),
        *("routing_transformer_image_nano", "routing_transformer_lucidrains_nano"),
        "routing_transformer_seq2seq_nano",
    ),
    "full": (
        *("vit_small_patch16_224", "deit_small_patch16_224", "davit_tiny", "maxvit_tiny_tf_224", "biformer_tiny"),
        *("care_s0", "dcal_deit_tiny", "ahan_vit_b16", "transformer_340m", "linear_attention_340m", "retnet_340m"),
        *("gla_340m", "deltanet_340m", "gated_deltanet_340m", "yaad_340m", "routing_transformer_wikitext103_4k"),
        *(
            "routing_transformer_imagenet64",
            "routing_transformer_lucidrains_enwik8",
            "routing_transformer_translate_1k",
        ),
    ),
}
EFFORTS = {"small": Effort(7, 0.03, 1.5), "full": Effort(15, 0.1, 10.0)}
# Pixels of a batch of images, tokens of one of rows, at most 64 of either; on a CPU and elsewhere.
BATCHES = {"cpu": (4 * 224 * 224, 4 * 256), "accelerator": (128 * 224 * 224, 4 * 4096)}
MOST = {"cpu": 64, "accelerator": 512}


def batch_size(name: str, here: str) -> int:
    """Images or rows of a batch: a power of two."""
    model = registry.create_model(name)
    pixels, tokens = BATCHES[here]
    fit = tokens // model.length if isinstance(model, SequenceModel) else pixels // model.input_size()[0] ** 2
    return 2 ** (max(1, min(fit, MOST[here])).bit_length() - 1)


def jobs(size: str, ops: Sequence[str], shapes: Sequence[str], dtypes: Sequence[str], here: str):
    """What was asked for, in the order of `MODELS`.

    Raises:
        ValueError: for an unknown model or shape, with the nearest.
    """
    for op in ops:
        check_choice("op", op, registry.list_models())
    made = [model_steps.job(name, batch_size(name, here), dtype) for name in ops or MODELS[size] for dtype in dtypes]
    return chosen_shapes(made, shapes, lambda each: each.row["shape"])


def estimates(made: Sequence[model_steps.Job], on: plan.Target, tell: Callable[[str], None]) -> list[rows.Row]:
    """What `train.plan` makes of the training steps, as estimates for devices that are not here."""
    found = []
    for each in made:
        row = model_steps.blank(each, "training", "zoo", on.kind, on.platform)
        found.append(row)
        config = ml_collections.ConfigDict(each.config)
        config.data.batch_size = each.config.data.batch_size * on.count
        row.shape = f"{row.shape} on each of {on.count}"
        try:
            planned = plan.plan(config, on, dataset=each.dataset, say=tell)
        except (ValueError, NotImplementedError) as error:
            row.status, row.reason = "not supported", str(error)
            continue
        row.parameters, row.peak_bytes, row.bytes = planned.parameters, planned.hbm_bytes_peak, planned.bytes
        row.flops = planned.model_flops and planned.model_flops // on.count
        if planned.fits is False:
            row.status, row.reason = "out of memory", f"takes more than {planned.hbm_bytes_limit / 2**30:.1f} GiB"
        elif planned.seconds is None:
            row.status, row.reason = "not measured", "; ".join(planned.notes) or "the planner has no time for it"
        else:
            row.status, row.reason, row.method = "estimate", REASON, "roofline of the compiled program"
            row.estimate_ms, row.bound = planned.seconds * 1e3, planned.bound
            setattr(row, f"{planned.unit}_per_s", planned.per_second)
    return found


def run(arguments: argparse.Namespace, tell: Callable[[str], None]) -> tuple[dict[str, Any], list[rows.Row]]:
    """Meta data and rows of what was asked for."""
    if arguments.topology:
        on = plan.target(arguments.topology)
        size, dtypes = arguments.size or "full", arguments.dtypes or ["bfloat16"]
        found = estimates(jobs(size, arguments.ops, arguments.shapes, dtypes, "accelerator"), on, tell)
        rate, bandwidth = (on.peak.flops, on.peak.bandwidth) if on.peak else (1.0, 1.0)
        bounds, device = Limits(dict.fromkeys(dtypes, rate), bandwidth, DATA_SHEET), (on.devices or jax.devices())[0]
        repeats = 0
    else:
        here = "cpu" if jax.default_backend() == "cpu" else "accelerator"
        size = arguments.size or ("small" if here == "cpu" else "full")
        dtypes = arguments.dtypes or ["float32" if here == "cpu" else "bfloat16"]
        made = jobs(size, arguments.ops, arguments.shapes, dtypes, here)
        made = [
            dataclasses.replace(
                each, peers=timm_steps.peers(each.row["op"], each.config.data.batch_size, each.config.dtype)
            )
            for each in made
        ]
        device = jax.devices()[0]
        bounds, effort = limits(device, dtypes), EFFORTS[size]
        effort = dataclasses.replace(effort, repeats=arguments.repeats or effort.repeats)
        repeats = effort.repeats
        found = model_steps.measure(made, bounds, effort, tell=tell)
    about = meta(device, bounds, "models", size, repeats, found)
    # What models compute is compared with their references by the tests.
    return about | {"peers": timm_steps.versions(), "error_bounds": None}, found


def parser(description: str, prog: str) -> argparse.ArgumentParser:
    """The options that the suites share, as `kernels.bench` hands them on."""
    made = commands.parser(prog, description)
    made.add_argument("--size", choices=("small", "full"))
    for name in ("--ops", "--shapes", "--dtypes"):
        made.add_argument(name, type=names, default=[])
    made.add_argument("--repeats", type=int)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; the exit code is 2 where an argument is wrong."""
    made = parser(__doc__, "train.bench_models")
    made.add_argument("--topology")
    return told(lambda tell: run(made.parse_args(argv), tell))


def told(run: Callable[[Callable[[str], None]], tuple[dict[str, Any], list[rows.Row]]]) -> int:
    """Prints what `run` gives as JSON; what it has to say and its errors go to stderr."""
    try:
        print(rows.to_text(*run(lambda line: print(line, file=sys.stderr, flush=True))), flush=True)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    # Torch wants some of the memory too.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    sys.exit(main())
