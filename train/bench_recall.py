"""Recall of sequence mixers at equal width and state, beside their speed: `python -m kernels.bench --suite recall`.

    python -m train.bench_recall --size small --workdir runs/recall --ops transformer,gated_deltanet

Every mixer is trained on key-value pairs and on a passkey (`configs/recall.py`) with three seeds, each run in a
directory of its own: what was interrupted goes on, what is done is not trained again. The larger setting takes the
best of four learning rates by a seed of its own. Prints one line of JSON on stdout, `{"meta": ..., "rows": [...]}` as
`kernels.bench` writes it; progress goes to stderr.
"""

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import ml_collections
from etils import epath

from kernels.bench import rows
from kernels.bench.limits import Limits, limits
from kernels.bench.measure import Effort
from kernels.bench.meta import meta
from kernels.bench.suites import chosen_shapes, name
from kernels.choices import check_choice
from kernels.cost import tree_bytes
from train import config as config_lib
from train import host, inputs, loop, model_steps, program
from train.bench_models import EFFORTS, parser, told
from train.compare import state_after, trained
from zoo.pretrained import abstract_variables

CONFIG = "configs/recall.py"
SEEDS = (0, 1, 2)
# Seed on which learning rates are compared: neither its weights nor its examples are those of a score.
VALIDATION_SEED = 100
# Mixer -> the variant of `kernels.bench` that it is made of.
VARIANTS = {
    "transformer": "softmax",
    "sliding_window": "local",
    "linear_attention": "no decay",
    "retnet": "retention",
    "gla": "GLA",
    "deltanet": "delta",
    "gated_deltanet": "gated delta",
    "yaad": "yaad",
    "moneta": "moneta",
    "memora": "memora",
}
MIXERS = {
    "small": ("transformer", "linear_attention", "retnet", "deltanet", "gated_deltanet", "yaad"),
    "full": tuple(VARIANTS),
}
LEARNING_RATES = (1e-4, 4.64e-4, 2.15e-3, 1e-2)
WIDTHS = (64, 128, 256, 512)
# States that differ by less count as equal: a position more or less is none.
NEARLY = 0.05


@dataclasses.dataclass(frozen=True)
class Setting:
    """Two tasks, and the models that are trained on them.

    Attributes:
        tasks: what a score is called -> the task of `configs/recall.py`.
        shape: in tables.
        words: on the command line of every run.
        rates: learning rates of which the best one is taken; empty: the config's.
    """

    tasks: dict[str, str]
    shape: str
    words: tuple[str, ...] = ()
    rates: tuple[float, ...] = ()


def settings(size: str) -> list[Setting]:
    """Of the small preset one; of the published setting one for every length and width."""
    if size == "small":
        return [Setting(dict(mqar="mqar_small", passkey="passkey_small"), "N32 4-pairs width-64")]
    return [
        Setting(
            dict(mqar=f"mqar_{length}x{pairs}", passkey=f"passkey_{length}"),
            f"N{length} {pairs}-pairs width-{width}",
            (f"{config_lib.FLAG}model.overrides.width={width}",),
            LEARNING_RATES,
        )
        for length, pairs in ((64, 4), (128, 8), (256, 16), (512, 64))
        for width in WIDTHS
    ]


def run(arguments: argparse.Namespace, tell: Callable[[str], None]) -> tuple[dict[str, Any], list[rows.Row]]:
    """Meta data and rows of what was asked for."""
    here = "cpu" if jax.default_backend() == "cpu" else "accelerator"
    size = arguments.size or ("small" if here == "cpu" else "full")
    dtypes = arguments.dtypes or ["float32"]
    by_name = {name(word): mixer for mixer, variant in VARIANTS.items() for word in (mixer, variant)}
    for op in arguments.ops:
        check_choice("op", name(op), by_name)
    mixers = tuple(dict.fromkeys(by_name[name(op)] for op in arguments.ops)) or MIXERS[size]
    wanted = chosen_shapes(settings(size), arguments.shapes, lambda each: each.shape)
    device = jax.devices()[0]
    bounds, effort = limits(device, dtypes), EFFORTS[size]
    effort = dataclasses.replace(effort, repeats=arguments.repeats or effort.repeats)
    workdir = epath.Path(arguments.workdir)
    host.cache_compiled_programs()
    found = []
    for setting in wanted:
        for dtype in dtypes:
            together: list[rows.Row] = []
            for mixer in mixers:
                together += _rows(Runs(mixer, setting, dtype, workdir, tell), bounds, effort, tell)
            _compare_states(together)
            found += together
    about = meta(device, bounds, "recall", size, effort.repeats, found)
    return about | {"peers": {}, "error_bounds": None, "workdir": str(arguments.workdir)}, found


@dataclasses.dataclass(frozen=True)
class Runs:
    """The trainings of one mixer in one setting."""

    mixer: str
    setting: Setting
    dtype: str
    workdir: epath.Path
    tell: Callable[[str], None]

    def config(self, task: str, seed: int, rate: float | None = None) -> ml_collections.FrozenConfigDict:
        words = [*self.setting.words, f"{config_lib.FLAG}seed={seed}", f"{config_lib.FLAG}dtype={self.dtype}"]
        words += [f"{config_lib.FLAG}optim.lr={rate}"] * (rate is not None)
        return config_lib.load(f"{CONFIG}:{task},{self.mixer}", words)

    def accuracy(self, task: str, seed: int, rate: float | None = None) -> float:
        """Of a run, made where it is not there; 0 for one whose loss stops being finite."""
        config = self.config(task, seed, rate)
        width = config.model.overrides.width
        place = self.workdir / f"{task}_{self.mixer}_w{width}_{self.dtype}_lr{config.optim.lr:g}_seed{seed}"
        self.tell(f"{self.mixer}, {task}, width {width}, learning rate {config.optim.lr:g}, seed {seed}")
        try:
            return trained(config, place)["test_accuracy"]
        except loop.NotFinite as error:
            self.tell(str(error))
            return 0.0

    def scores(self) -> dict[str, list[float]]:
        """The accuracies of all seeds, by what the score is called."""
        found = {}
        for score, task in self.setting.tasks.items():
            rates = self.setting.rates
            best = max(rates, key=lambda rate: self.accuracy(task, VALIDATION_SEED, rate)) if rates else None
            found[score] = [self.accuracy(task, seed, best) for seed in SEEDS]
        return found


def _rows(runs: Runs, bounds: Limits, effort: Effort, tell: Callable[[str], None]) -> Iterator[rows.Row]:
    """The speed of the model that is trained on key-value pairs, with what it and its likes recall."""
    scores = runs.scores()
    config = runs.config(runs.setting.tasks["mqar"], SEEDS[0])
    dataset = inputs.open_dataset(config, config.data.split)
    row = dict(
        op=runs.mixer,
        variant=VARIANTS[runs.mixer],
        label=runs.mixer,
        family="recall",
        shape=runs.setting.shape,
        pattern="self causal",
    )
    job = model_steps.Job(config, dataset, row)
    for found in model_steps.measure([job], bounds, effort, tell=tell):
        found.seeds = len(SEEDS)
        for score, values in scores.items():
            setattr(found, score, statistics.fmean(values))
            setattr(found, f"{score}_low", min(values))
            setattr(found, f"{score}_high", max(values))
        found.state_bytes = state_bytes(config, dataset)
        found.state_bytes_per_token = found.state_bytes / dataset.length
        yield found


def state_bytes(config: ml_collections.FrozenConfigDict, dataset: Any) -> int:
    """What a decoder carries of one row."""
    model = program.build_model(config, dataset)
    return tree_bytes(state_after(model, abstract_variables(model), dataset.length))


def _compare_states(found: Sequence[rows.Row]) -> None:
    """Marks the rows whose state is as large as that of most."""
    usual = statistics.mode(row.state_bytes for row in found)
    for row in found:
        row.equal_state = abs(row.state_bytes - usual) <= NEARLY * usual


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; the exit code is 2 where an argument is wrong."""
    made = parser(__doc__, "train.bench_recall")
    made.add_argument("--workdir", default="runs/recall", metavar="DIR", help="where the runs are kept")
    host.keep_freed_memory()
    return told(lambda tell: run(made.parse_args(argv), tell))


if __name__ == "__main__":
    sys.exit(main())
