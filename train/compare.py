"""Trains every model of a table one after the other and prints the table.

    python -m train.compare --config configs/text.py:miras --workdir runs/text
    python -m train.compare --config configs/recall.py:mqar --workdir runs/mqar --only mqar,gated_deltanet

A table is a name in the config file's `TABLES`, and its rows are arguments of `get_config`. Every row is a run of
`python -m train` in a directory of its own under the workdir: what was interrupted goes on, what is done is read back.
Progress goes to stderr; stdout gets the table and one line of JSON.
"""

import json
import sys
from collections.abc import Sequence
from typing import Any

import jax
import ml_collections
from etils import epath

from train import commands, evaluate, host, loop, text, verification_metrics
from train import config as config_lib
from train.sequences import SequenceSet
from zoo.registry import nearest
from zoo.sequence.sequence_model import SequenceModel
from zoo.tables import scaled, table

RESULT_FILE = "result.json"
# Metric -> its column's head, and how a number is written.
METRICS = {
    "test_accuracy": ("accuracy", "{:.2%}"),
    "test_general_accuracy": ("strangers", "{:.1%}"),
    "test_twin_accuracy": ("twins", "{:.1%}"),
    "test_hard_twin_accuracy": ("hard twins", "{:.1%}"),
    "test_twin_auc": ("AUC of twins", "{:.3f}"),
    "test_twin_tar_at_far_1pct": ("their TAR at 1 % FAR", "{:.1%}"),
    "test_bits_per_byte": ("bits per byte", "{:.3f}"),
    "cost_of_clearing": ("cost of clearing", "{:.3f}"),
    "test_bits_per_token": ("bits per token", "{:.3f}"),
}
# What is counted of a row, each a column.
SIZES = ("parameters", "state", "tokens", "images")
# Rows of tokens on which a memory that is cleared is compared with one that is not.
CLEARED_ROWS = 256


def compare(spec: str, workdir: epath.PathLike, only: Sequence[str] = (), overrides: Sequence[str] = ()):
    """The rows of a table, each trained where it is not yet.

    Args:
        spec: a config file and the name of one of its tables.
        workdir: one directory per row is made in it.
        only: the rows wanted; empty: all.
        overrides: `--config.KEY=VALUE` words for every row.

    Returns:
        One dict per row: `row`, `model`, `parameters`, `seconds` (of the run from start to end), and its metrics; of
        sequences also `state` (numbers that the state of one holds after `length` tokens) and `tokens` (seen in
        training), of others `images`.

    Raises:
        ValueError: for an unknown table or row.
        TrainingError, CheckpointError: as `train.loop.train` does.
    """
    file, rows = config_lib.table(spec)
    for row in only:
        if row not in rows:
            raise ValueError(f"{spec} has no row {row!r}{nearest(row, rows)}")
    found = []
    for row in only or rows:
        config = config_lib.load(f"{file}:{row}", overrides)
        found.append({"row": row, **trained(config, _place(workdir, row))})
    return found


def contrasted(spec: str, workdir: epath.PathLike, rows: Sequence[str]) -> dict[str, dict[str, Any]]:
    """How much more accurate the rows of faces are than others, by `train.verification_metrics.contrast`.

    Args:
        spec: as of `compare`; `CONTRASTS` of the config file says what is compared with what, all seeds of a row with
            all of the other.
        workdir: where `compare` trained them.
        rows: those that there are.

    Returns:
        "ROW - OTHER" to the differences of every kind of pairs; nothing for files without contrasts.
    """
    found, scored = {}, {}

    def side(name):
        wanted = [row for row in rows if row.partition(",")[0] == name]
        for row in wanted:
            if row not in scored:
                scored[row] = evaluate.score_faces(_place(workdir, row)).scored
        return [scored[row] for row in wanted]

    for ours, theirs in config_lib.contrasts(spec):
        if all(any(row.partition(",")[0] == name for row in rows) for name in (ours, theirs)):
            found[f"{ours} - {theirs}"] = verification_metrics.contrast(side(ours), side(theirs))
    return found


def _place(workdir: epath.PathLike, row: str) -> epath.Path:
    return epath.Path(workdir) / row.replace(",", "_")


def trained(config: ml_collections.FrozenConfigDict, workdir: epath.Path) -> dict[str, Any]:
    """What training a config gave, as a row of `compare`: read back where it is done, else done."""
    path, described = workdir / RESULT_FILE, config_lib.plain(config)
    if path.exists():
        kept = json.loads(path.read_text())
        if not config_lib.differences(kept.pop("config"), config):
            return kept
    run = loop.prepare(config, str(workdir))
    result = loop.train(run)
    model, examples = run.program.model, result["step"] * config.data.batch_size
    if isinstance(run.train_set, SequenceSet):
        length = run.train_set.length
        state = state_after(model, run.program.abstract_state.variables(), length)
        seen = {"state": sum(leaf.size for leaf in jax.tree.leaves(state)), "tokens": examples * length}
    else:
        seen = {"images": examples}
    result = {
        "model": config.model.name,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(run.program.abstract_state.params)),
        **seen,
        **result,
    }
    if "test_bits_per_byte" in result:
        if getattr(model, "has_memory", False):
            result["cost_of_clearing"] = _cost_of_clearing(workdir)
        documents = text.open_documents(
            config.data.name, split=config.data.eval_split, path=config.data.path, **config.data.options
        )
        result["zlib_bits_per_byte"] = text.zlib_bits_per_byte(documents.texts)
    path.write_text(json.dumps({**result, "config": described}))
    return result


def state_after(model: SequenceModel, variables: Any, length: int) -> Any:
    """What a model carries of one sequence that has room for so many tokens, as shapes and dtypes."""
    beside = {name: like for name, like in model.example_inputs().items() if name != "tokens"}

    def initial(variables, beside):
        return model.apply(variables, 1, length, **beside, method="initial_state")

    return jax.eval_shape(initial, variables, beside)


def _cost_of_clearing(workdir: epath.Path) -> float:
    """Bits per byte lost where the memories are cleared at every token, on the first rows of the test split."""
    kept, cleared = (
        evaluate.score_run(
            workdir, examples=CLEARED_ROWS, overrides=[f"{config_lib.FLAG}model.overrides.clear_every={every}"]
        )["test_bits_per_byte"]
        for every in (0, 1)
    )
    return cleared - kept


def _columns(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A line per row: what it is, what it cost, and the metrics that any row has."""
    names = [name for name in METRICS if any(name in row for row in rows)]
    sizes = [name for name in SIZES if any(name in row for row in rows)]
    cells = [("", *sizes, "seconds", *(METRICS[name][0] for name in names))]
    for row in rows:
        counts = (scaled(row[name]) if name in row else "" for name in sizes)
        values = (_written(name, row) if name in row else "" for name in names)
        cells.append((row["row"], *counts, f"{row['seconds']:,.0f}", *values))
    return table(cells, "<" + ">" * (len(cells[0]) - 1))


def _contrast_lines(contrasts: dict[str, dict[str, Any]]) -> list[str]:
    """Differences of accuracies in points of a percent, each with its interval."""
    kinds = {"general": "strangers", "twin": "twins", "hard_twin": "hard twins"}
    cells = [("accuracy, mean of seeds", *kinds.values())]
    for name, found in contrasts.items():
        values = []
        for kind in kinds:
            here = found.get(kind, {})
            value, *interval = (f"{100 * here[key]:+.1f}" for key in ("difference", "low", "high") if key in here)
            values.append(f"{value} [{', '.join(interval)}]" if interval else value)
        cells.append((name, *values))
    return table(cells, "<>>>")


def _written(name: str, row: dict[str, Any]) -> str:
    """A metric of a row, with its confidence interval where it has one."""
    ends = [f"{name}_{end}" for end in ("low", "high")]
    value, *interval = (METRICS[name][1].format(row[key]) for key in (name, *ends) if key in row)
    return f"{value} [{', '.join(interval)}]" if interval else value


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: its arguments; None means those of the process.

    Returns:
        The exit code: 0 done, 1 a training failed, 2 the arguments, the data or the workdir are wrong.
    """
    parser = commands.parser("train.compare", __doc__)
    parser.add_argument("--config", required=True, metavar="FILE:TABLE", help="a config file and one of its tables")
    parser.add_argument("--workdir", required=True, metavar="DIR", help="where the runs are kept; goes on with them")
    parser.add_argument("--only", action="append", default=[], metavar="ROW", help="this row; may be given again")
    parser.add_argument("--full", action="store_true", help="TABLE_full, which has more rows, in the place of TABLE")
    arguments, overrides = parser.parse_known_args(argv)
    spec = arguments.config + "_full" * arguments.full
    host.keep_freed_memory()
    host.cache_compiled_programs()
    try:
        rows = compare(spec, arguments.workdir, arguments.only, overrides)
        contrasts = contrasted(spec, arguments.workdir, [row["row"] for row in rows])
    except loop.TrainingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except evaluate.ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(_columns(rows)))
    if figures := {row["zlib_bits_per_byte"] for row in rows if "zlib_bits_per_byte" in row}:
        print(f"zlib at level 9, given the whole test text at once: {min(figures):.3f} bits per byte")
    if contrasts:
        print("\n" + "\n".join(_contrast_lines(contrasts)) + "\n")
    contrasts = {"contrasts": contrasts} if contrasts else {}
    print(
        json.dumps(
            contrasts | {row["row"]: {name: value for name, value in row.items() if name != "row"} for row in rows}
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
