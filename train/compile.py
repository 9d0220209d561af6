"""Plans a training before any accelerator is rented: does it fit, what bounds it, what does another setting change?

    python -m train.compile --config configs/imagenet.py:davit_tiny --topology v5e:4x4 --batch auto
    python -m train.compile --config configs/imagenet.py:davit_giant --topology v5e:16x16 \\
        --compare remat=full --compare mesh.data=1,mesh.fsdp=-1 --config.data.batch_size=1024
    python -m train.compile --config configs/imagenet.py:davit_giant --topology v5e:16x16 --effort O0
    python -m train.compile --config configs/text.py:yaad_nano --topology h100:8

The training step is compiled for TPUs that are not there, by the compiler that they would use (pip install
'attention-zoo[plan]'); no data is needed. For GPUs it is only lowered, and less is known. A step that does not fit is a
result. What is being done goes to stderr, the table to stdout.
"""

import argparse
import dataclasses
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import ml_collections
from etils import epath

from train import commands, evaluate, plan, plan_table, sharding
from train import config as config_lib

# A batch is refined in steps of an eighth of the power of two below it, examples per device.
REFINED = 8
LARGEST = 2**20


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: its arguments; None means those of the process.

    Returns:
        The exit code: 0 planned, whether it fits or not; 2 the settings are wrong; 130 interrupted by the keyboard.
    """
    arguments, overrides = _parser().parse_known_args(argv)
    # What was compiled for devices that are not there cannot be read back.
    jax.config.update("jax_enable_compilation_cache", False)
    started = time.perf_counter()

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - started:4.0f} s] {text}", file=sys.stderr, flush=True)

    try:
        plans = make(
            arguments.config,
            arguments.topology,
            overrides=overrides,
            batch=arguments.batch,
            compare=arguments.compare,
            classes=arguments.classes,
            effort=arguments.effort,
            say=say,
        )
        if arguments.json:
            epath.Path(arguments.json).write_text(json.dumps(as_json(plans), indent=2) + "\n")
    except (*evaluate.ERRORS, RuntimeError) as error:
        if isinstance(error, jax.errors.JaxRuntimeError):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    plan_table.show(plans, sys.stdout)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = commands.parser(
        "train.compile", __doc__, epilog="The config's keys are set by --config.KEY=VALUE, as for python -m train."
    )
    parser.add_argument("--config", required=True, metavar="FILE:ARG", help="a config file and its argument")
    parser.add_argument(
        "--topology", required=True, metavar="NAME", help="a TPU slice such as v5e:16x16, or GPUs such as h100:8"
    )
    parser.add_argument(
        "--batch",
        metavar="auto|N",
        type=_batch,
        help="examples of a step over all devices (the config's); auto: the largest that fits",
    )
    parser.add_argument(
        "--compare",
        action="append",
        default=[],
        metavar="KEY=VALUE[,KEY=VALUE]",
        help="plan this too, side by side; repeatable",
    )
    parser.add_argument("--classes", type=_positive, metavar="N", help="of image data that is not there to be counted")
    parser.add_argument(
        "--effort",
        choices=plan.EFFORTS,
        help="of the compiler for TPUs; O0 takes about a fifth of the CPU time on davit_tiny and overstates traffic "
        "(default: as in training)",
    )
    parser.add_argument("--json", metavar="FILE", help="write all numbers there")
    return parser


def _batch(text: str) -> int | str:
    return text if text == "auto" else _positive(text)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def make(
    spec: str,
    topology: str,
    *,
    overrides: Sequence[str] = (),
    batch: int | str | None = None,
    compare: Sequence[str] = (),
    classes: int | None = None,
    effort: str | None = None,
    say: plan.Say = lambda text: None,
) -> list[plan.Plan]:
    """The plan of a config, and those of its variants.

    Args:
        spec, overrides: see `train.config.load`.
        topology: see `train.plan.target`.
        batch: examples of a step over all devices; `"auto"` finds the largest that fits, of every variant its own.
        compare: variants, each `"KEY=VALUE"` or several of those with commas between.
        classes: see `train.stand_in.dataset`.
        effort: see `train.plan.plan`.
        say: is told what is being done.

    Raises:
        ValueError: for settings that do not fit one another.
        RuntimeError: if libtpu is not installed.
    """
    changes = [(), *map(variant, compare)]
    batch_word = () if batch in (None, "auto") else (f"{config_lib.FLAG}data.batch_size={batch}",)
    # All of them are checked before the first one is compiled.
    configs = [config_lib.load(spec, (*overrides, *batch_word, *words)) for words in changes]
    say(f"asking for the devices of {topology}")
    on = plan.target(topology)
    for config in configs:
        mesh = on.mesh(config)
        if batch != "auto":
            sharding.check_batch("config.data.batch_size", config.data.batch_size, mesh, config.accum_steps)
    if batch == "auto" and on.platform != "tpu":
        raise ValueError(f"--batch auto needs a compiler, which there is none of for {topology}; give a number")
    plans = []
    for config, label in zip(configs, ("as given", *compare)):
        how = dict(label=label, classes=classes, effort=effort, say=say)
        if batch == "auto":
            plans.append(_largest(config, on, how))
        else:
            plans.append(plan.plan(config, on, **how))
    return plans


def variant(text: str) -> tuple[str, ...]:
    """Words of a command line of `"KEY=VALUE,KEY=VALUE"`; a value may have commas in it, `"x=(1, 2),y=3"`.

    Raises:
        ValueError: for text without a key.
    """
    parts = re.split(r",(?=[A-Za-z_][\w.]*=)", text)
    for part in parts:
        if not re.match(r"[A-Za-z_][\w.]*=", part):
            raise ValueError(f"--compare {text!r}: write KEY=VALUE, such as remat=full or mesh.data=1,mesh.fsdp=-1")
    return tuple(config_lib.FLAG + part for part in parts)


def _largest(config: ml_collections.FrozenConfigDict, on: plan.Target, how: dict[str, Any]) -> plan.Plan:
    """The plan with the largest batch that fits; with the smallest possible where none does."""
    mesh = on.mesh(config)
    step = config.accum_steps * mesh.shape["data"] * mesh.shape["fsdp"]
    say = how["say"]

    def attempt(count: int) -> plan.Plan:
        size = config_lib.overlay(config, [f"{config_lib.FLAG}data.batch_size={count * step}"])
        found = plan.plan(size, on, **how)
        verdict = "fits" if found.fits else "does not fit"
        say(f"batch {found.batch} {verdict}: {plan_table.size(found.hbm_bytes_peak)} of {plan_table.size(on.memory)}")
        return found

    return largest(attempt, max(1, config.data.batch_size // step))


def largest(attempt: Callable[[int], plan.Plan], start: int) -> plan.Plan:
    """The plan with the most examples per device that fits: a power of two, then refined by eighths of it.

    Args:
        attempt: the plan with so many.
        start: where to begin.

    Returns:
        That plan; where not even one example fits, the one with one.
    """
    tried: dict[int, plan.Plan] = {}
    count = _power_of_two(min(start, LARGEST))
    # First powers of two that enclose the answer, then what lies between them.
    while True:
        tried[count] = attempt(count)
        fitting = [count for count, each in tried.items() if each.fits]
        failing = [count for count, each in tried.items() if not each.fits]
        low, high = max(fitting, default=0), min(failing, default=2 * LARGEST)
        guess = _guess({low: tried[low], high: tried[high]} if low in tried and high in tried else tried)
        if not low and high == 1:
            return tried[1]
        if not low:
            count = min(_power_of_two(guess), high // 2) if len(tried) > 1 else high // 2
        elif high > LARGEST:
            if low == LARGEST:
                return tried[low]
            count = min(max(2 * low, _power_of_two(guess)), LARGEST)
        elif high > 2 * _power_of_two(low):
            count = min(max(2 * low, _power_of_two(guess)), high // 2)
        else:
            unit = max(1, _power_of_two(low) // REFINED)
            if high - low <= unit:
                return tried[low]
            count = min(max(guess // unit * unit, low + unit), high - unit)


def _power_of_two(count: int) -> int:
    """The largest power of two that is no larger."""
    return 2 ** (max(count, 1).bit_length() - 1)


def _guess(tried: dict[int, plan.Plan]) -> int:
    """How many would just fit, if memory grew linearly between, and beyond, the two that are nearest to the limit."""
    nearest = sorted(tried, key=lambda count: abs(tried[count].hbm_bytes_limit - tried[count].hbm_bytes_peak))[:2]
    if len(nearest) < 2:
        return 0
    a, b = sorted(nearest)
    growth = tried[b].hbm_bytes_peak - tried[a].hbm_bytes_peak
    room = tried[a].hbm_bytes_limit - tried[a].hbm_bytes_peak
    return max(0, a + int((b - a) * room / growth)) if growth > 0 else 0


def as_json(plans: Sequence[plan.Plan]) -> dict[str, Any]:
    """The first plan, and under `variants` the others by their labels."""
    first, *others = map(dataclasses.asdict, plans)
    return first | {"variants": {other["label"]: other for other in others}}


if __name__ == "__main__":
    sys.exit(main())
