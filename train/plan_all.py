"""Plans every family's training on slices of TPUs that are not there, and prints a table: what fits, what bounds it.

    python -m train.plan_all --json plans.json                                         # hours on four cores
    python -m train.plan_all --json plans.json --models davit_giant,yaad_1b3 --topologies v5e:16x16 --meshes fsdp
    python -m train.plan_all --json plans.json --effort O0         # about a fifth of the CPU time on davit_tiny

Each plan is made by `python -m train.compile` in a process of its own and kept in the file as soon as it is there; what
is in the file is not planned again. A step that does not fit is planned once more with its blocks recomputed, then with
half its batch, and so on down to one example for each device of the batch. Progress goes to stderr.

Exit codes: 0 every plan was made and fits, 1 one was not or does not, 2 the arguments are wrong, 130 interrupted.
"""

import argparse
import concurrent.futures
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from etils import epath

from kernels.choices import names
from train import commands, plan, plan_table
from train import config as config_lib
from train.metrics import replace_file

TOPOLOGIES = ("v5e:16x16", "v6e:16x16", "v5p:4x4x4")
MESHES = {"fsdp": "mesh.data=1,mesh.fsdp=-1", "fsdp+tensor": "mesh.data=1,mesh.fsdp=-1,mesh.tensor=4"}

Words = tuple[str, ...]
Row = dict[str, Any]


def _image(name: str, batch: int, *words: str) -> tuple[str, str, Words]:
    return name, f"configs/imagenet.py:{name}", (f"data.batch_size={batch}", *words)


def _text(name: str, length: int = 4096, *words: str) -> tuple[str, str, Words]:
    """A million tokens a step of the vocabulary that the model was published with, by AdamW in bfloat16."""
    nano = "routing_transformer_nano" if name.startswith("routing") else re.sub(r"_[^_]+$", "_nano", name)
    settings = (f"model.name={name}", f"data.length={length}", f"data.batch_size={max(256, 2**20 // length)}")
    return name, f"configs/text.py:{nano}", (*settings, "optim.name=adamw", "optim.lr=4e-4", "dtype=bfloat16", *words)


_VOCABULARY = "model.overrides.vocab_size=32000"
_MEMORY = (_VOCABULARY, "model.overrides.conv_width=4", "remat=full")

# Three that are large, then one of every family and of every mixer.
_MODELS = (
    _image("davit_giant", 1024),
    _image("maxvit_xlarge_tf_224", 4096, "remat=full"),
    _text("yaad_1b3", 4096, *_MEMORY),
    _text("moneta_1b3", 4096, *_MEMORY),
    _image("maxvit_tiny_tf_224", 4096),
    _image("biformer_small", 1024),
    _image("care_s2", 1536, "distill.teacher="),
    _image("vit_base_patch16_224", 1024),
    _image("dcal_deit_small", 256, "data.image_size=448"),
    _image("ahan_vit_b16", 1024),
    *(_text(f"{name}_170m", 4096, _VOCABULARY) for name in ("transformer", "sliding_window", "linear_attention")),
    *(_text(f"{name}_170m", 4096, _VOCABULARY) for name in ("retnet", "lightning", "gla", "hgrn2")),
    *(_text(f"{name}_170m", 4096, _VOCABULARY) for name in ("hgrn2_h", "gated_deltanet_h")),
    *(_text(f"{name}_170m", 4096, *_MEMORY) for name in ("deltanet", "gated_deltanet", "memora")),
    _text("routing_transformer_enwik8_8k", 8192, "model.overrides.vocab_size=256", "remat=full"),
    _text("routing_transformer_imagenet64", 12288, "model.overrides.vocab_size=256", "remat=full"),
)
MODELS = {name: (spec, words) for name, spec, words in _MODELS}

_SMALL = ("davit", "maxvit", "biformer", "care", "vit", "dcal", "ahan")
_MIXERS = ("transformer", "gla", "gated_deltanet", "yaad", "routing_transformer")
# One of every family, and of every kernel's.
NANOS = {
    **{f"{name}_nano": (f"configs/digits.py:{name}_nano", ()) for name in _SMALL[:-1]},
    "ahan_nano": ("configs/imagenet.py:ahan_nano", ("data.image_size=48", "data.batch_size=64")),
    **{f"{name}_nano": (f"configs/text.py:{name}_nano", ()) for name in _MIXERS},
    "routing_transformer_image_nano": ("configs/raster.py:routing_transformer_image_nano", ()),
    "routing_transformer_seq2seq_nano": ("configs/recall.py:copy,routing_transformer_seq2seq", ()),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: its arguments; None means those of the process.

    Returns:
        The exit code: 0 every plan was made and fits, 1 one was not or does not, 2 the arguments are wrong, 130
        interrupted by the keyboard.
    """
    arguments = _parser().parse_args(argv)
    file = epath.Path(arguments.json)
    started = time.monotonic()

    def say(text: str) -> None:
        # At once, as several plans are made at a time.
        sys.stderr.write(f"[{time.monotonic() - started:5.0f} s] {text}\n")
        sys.stderr.flush()

    try:
        rows = campaign(
            {name: MODELS[name] for name in arguments.models},
            arguments.topologies,
            {name: MESHES[name] for name in arguments.meshes},
            file,
            limit=arguments.limit,
            jobs=arguments.jobs,
            again=arguments.again,
            options=("--effort", arguments.effort) if arguments.effort else (),
            say=say,
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    print(markdown(rows))
    return 0 if all(fits(row) for row in rows) else 1


def _parser() -> argparse.ArgumentParser:
    parser = commands.parser("train.plan_all", __doc__)
    parser.add_argument("--json", required=True, metavar="FILE", help="all plans, as they come; what is there is kept")
    parser.add_argument("--models", type=_some_of(MODELS), default=list(MODELS), metavar="A,B", help="default: all")
    parser.add_argument("--topologies", type=names, default=TOPOLOGIES, metavar="A,B", help=", ".join(TOPOLOGIES))
    parser.add_argument("--meshes", type=_some_of(MESHES), default=list(MESHES), metavar="A,B", help=", ".join(MESHES))
    parser.add_argument("--effort", choices=plan.EFFORTS, help="of the compiler, see train.compile; default: its own")
    parser.add_argument("--limit", type=float, default=3600, metavar="SECONDS", help="for one plan (default: 3600)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="plans at once (default: 1)")
    parser.add_argument("--again", action="store_true", help="plan anew what had failed or had taken too long")
    return parser


def _some_of(known: dict[str, Any]) -> Callable[[str], list[str]]:
    def some(text: str) -> list[str]:
        if unknown := [name for name in names(text) if name not in known]:
            raise argparse.ArgumentTypeError(f"no {', '.join(unknown)}; there are {', '.join(known)}")
        return names(text)

    return some


def campaign(
    models: dict[str, tuple[str, Words]],
    topologies: Sequence[str],
    meshes: dict[str, str],
    file: epath.Path | None,
    *,
    limit: int | float,
    jobs: int = 1,
    again: bool = False,
    options: Words = (),
    say: plan.Say = lambda text: None,
) -> list[Row]:
    """Plans every model on every topology with every mesh.

    Args:
        models: name -> config and its words, `"KEY=VALUE"`.
        topologies: see `train.plan.target`.
        meshes: name -> words with commas between.
        file: rows that are there already, and where all go; None keeps none.
        limit: seconds for one plan.
        jobs: plans at once.
        again: plan rows that have an error anew.
        options: of `train.compile`, for all of them.
        say: is told what is being done.

    Returns:
        Rows in the order of the arguments: `model`, `topology`, `mesh`, `settings` that were planned with, `tried` and
        did not fit, `seconds`, and the `plan`, see `train.plan.Plan`, or an `error`.
    """
    rows = json.loads(file.read_text()) if file is not None and file.exists() else []
    kept = {_key(row): row for row in rows if not (again and "error" in row)}
    wanted = []
    for topology in topologies:
        for mesh, divided in meshes.items():
            for name, (spec, words) in models.items():
                first = dict(model=name, topology=topology, mesh=mesh, config=spec, options=list(options))
                wanted.append(first | dict(settings=[*words, *divided.split(",")]))
    for row in wanted:
        config_lib.load(row["config"], [config_lib.FLAG + word for word in row["settings"]])
    lock = threading.Lock()

    def run(row: Row) -> None:
        found = _fitting(row, limit, say)
        with lock:
            kept[_key(row)] = found
            if file is not None:
                replace_file(file, (json.dumps(list(kept.values()), indent=1) + "\n").encode())
        say(f"{_name(row)}: {_verdict(found)} ({found['seconds']:.0f} s)")

    missing = [row for row in wanted if _key(row) not in kept]
    say(f"{len(wanted)} plans, {len(wanted) - len(missing)} of them are there")
    pool = concurrent.futures.ThreadPoolExecutor(jobs)
    try:
        for done in [pool.submit(run, row) for row in missing]:
            done.result()
    finally:
        pool.shutdown(cancel_futures=True)
    return [kept[_key(row)] for row in wanted]


def _key(row: Row) -> str:
    return json.dumps(
        [row["asked"] if "asked" in row else row["settings"], *(row[n] for n in ("config", "topology", "options"))]
    )


def _name(row: Row) -> str:
    return f"{row['model']} on {row['topology']} ({row['mesh']})"


def fits(row: Row) -> bool:
    """Whether a row's plan was made and fits."""
    return "plan" in row and bool(row["plan"]["fits"])


def _verdict(row: Row) -> str:
    if "plan" not in row:
        return row["error"]
    found = row["plan"]
    verdict = "fits" if found["fits"] else "does not fit"
    memory = f"{plan_table.size(found['hbm_bytes_peak'])} of {plan_table.size(found['hbm_bytes_limit'])}"
    return f"batch {found['batch']} {verdict}, {memory}"


def _fitting(row: Row, limit: int | float, say: plan.Say) -> Row:
    """The row, planned with what it asks for or else with the first that fits of what `_smaller` has."""
    started, tried = time.monotonic(), []
    settings = row["settings"]
    while True:
        say(f"{_name(row)}: {' '.join(settings)}")
        found = _planned(row, settings, limit)
        if fits(found) or "error" in found:
            break
        tried.append(settings)
        say(f"{_name(row)}: {_verdict(found)}")
        less = _smaller(settings, found["plan"])
        if less is None:
            break
        settings = less
    return found | dict(asked=row["settings"], tried=tried, seconds=round(time.monotonic() - started, 1))


def _smaller(settings: Sequence[str], found: dict[str, Any]) -> list[str] | None:
    """Settings that take less memory, None where nothing is left."""
    if "remat=full" not in settings:
        return [*settings, "remat=full"]
    batch = found["batch"] // 2
    if batch % (found["mesh"]["data"] * found["mesh"]["fsdp"]):
        return None
    return [word for word in settings if not word.startswith("data.batch_size=")] + [f"data.batch_size={batch}"]


def _planned(row: Row, settings: Sequence[str], limit: int | float) -> Row:
    """One plan, made by a process of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    with tempfile.TemporaryDirectory(prefix="plan-") as place:
        file = epath.Path(place) / "plan.json"
        command = [sys.executable, "-m", "train.compile", "--config", row["config"], "--topology", row["topology"]]
        command += [*row["options"], "--json", str(file), *(config_lib.FLAG + word for word in settings)]
        result = row | dict(settings=list(settings))
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=limit)
        except subprocess.TimeoutExpired:
            return result | dict(error=f"not done in {limit:.0f} s")
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("[")]
            return result | dict(error=(said or [f"exit code {done.returncode}"])[-1][:500])
        return result | dict(plan=json.loads(file.read_text()))


def nanos() -> dict[str, Any]:
    """Plans `NANOS` on four chips, for `train.faults`: how many `models`, `planned` and `fit`, and what `failed`."""
    rows = campaign(NANOS, ("v5e:2x2",), {"fsdp": MESHES["fsdp"]}, None, limit=600, options=("--effort", "O0"))
    planned = [row for row in rows if "plan" in row]
    return dict(
        models=len(rows),
        planned=len(planned),
        fit=sum(map(fits, rows)),
        failed=[f"{row['model']}: {row['error']}" for row in rows if "error" in row],
    )


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a table, and below it how many were planned, fit and failed."""
    head = ("model", "topology", "mesh", "batch", "HBM peak of limit", "fits", "FLOPs a chip", "HBM moved")
    head += ("collectives", "bound by", "step, ESTIMATED", "seconds to plan")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [row["model"], row["topology"], row["mesh"]]
        if "plan" not in row:
            cells += [f"**{row['error']}**", *[""] * (len(head) - 5), f"{row['seconds']:.0f}"]
        else:
            cells += [*_cells(row, row["plan"]), f"{row['seconds']:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    planned = sum("plan" in row for row in rows)
    return "\n".join(
        [
            *lines,
            "",
            f"{len(rows)} plans: {planned} compiled, {sum(map(fits, rows))} fit, {len(rows) - planned} failed.",
        ]
    )


def _cells(row: Row, found: dict[str, Any]) -> Iterator[str]:
    yield f"{found['batch']:,}" + ", remat" * ("remat=full" in row["settings"])
    yield f"{found['hbm_bytes_peak'] / 2**30:.2f} of {found['hbm_bytes_limit'] / 2**30:.2f} GiB"
    yield "yes" if found["fits"] else "**no**"
    yield "" if found["flops"] is None else f"{found['flops'] / found['devices'] / 1e12:.2f} T"
    yield plan_table.size(found["bytes"])
    if found["collectives"] is None:
        yield "not known"
    else:
        each = found["collectives"].values()
        yield f"{sum(one['count'] for one in each):,} of {plan_table.size(sum(one['bytes'] for one in each))}"
    yield found["bound"] or ""
    yield plan_table.time(found["seconds"])


if __name__ == "__main__":
    sys.exit(main())
