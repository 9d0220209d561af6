"""Scores a verification run and draws what came out: ROC curves, histograms of scores, a sheet of faces.

    python -m train.face_report --workdir runs/twins --out runs/twins/pictures

Writes `roc.png`, `scores.png` and `faces.png`; what is printed on stdout is one line of JSON with the metrics.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from PIL import Image

from train import evaluate, host, inputs, metrics, program, tasks, verification_metrics
from train import verification_pictures as pictures
from train.face_set import FaceSet

# Pairs of twins on the sheet, and pictures of each person.
SHEET_PAIRS, SHEET_IMAGES = 6, 10


def report(
    workdir: epath.PathLike,
    out: epath.PathLike,
    *,
    step: int | None = None,
    raw: bool = False,
    split: str | None = None,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Scores a checkpoint of a run and writes the pictures.

    Args:
        workdir: of the run.
        out: directory of the pictures, made where it does not exist.
        step, raw, overrides: as in `train.evaluate.score_run`.
        split: such as "validation+test"; None: the run's `data.eval_split`.

    Returns:
        `step` and the metrics by name.

    Raises:
        ValueError: for a run of another task, or without a split to score.
        CheckpointError: if there is no good checkpoint.
    """
    step, config, variables = evaluate.load_run(workdir, step=step, raw=raw, overrides=overrides)
    split = split or config.data.eval_split
    if config.task != "verification" or not split:
        raise ValueError(f"{workdir} is a run of task {config.task!r} with eval_split {split!r}: nothing to verify")
    dataset = inputs.open_dataset(config, split)
    model = program.build_model(config, dataset)
    task = tasks.without_teacher(config, model, dataset)
    with jax.default_matmul_precision(config.matmul_precision):
        scored = evaluate.score(
            task,
            model,
            variables,
            dataset,
            transform=inputs.eval_transform(config, dataset),
            batch_size=config.data.eval_batch_size or config.data.batch_size,
            summarize=task.score,
        )
    directory = epath.Path(out)
    directory.mkdir(parents=True, exist_ok=True)
    title = f"{config.model.name}, step {step:,}: {dataset.name}"
    for name, image in (
        ("roc", pictures.roc_picture(scored, title)),
        ("scores", pictures.score_picture(scored, title)),
        ("faces", face_sheet(dataset)),
    ):
        with (directory / f"{name}.png").open("wb") as file:
            image.save(file, format="png")
    return {"step": step, **verification_metrics.summary(scored, replicates=task.replicates)}


def face_sheet(dataset: FaceSet, size: tuple[int, int] = (96, 96)) -> Image.Image:
    """Pictures of the last pairs of twins, a person a row, resized to `size` (width, height)."""
    rows, names = [], []
    for person in dataset.pairs[-SHEET_PAIRS:].ravel().tolist():
        taken = np.flatnonzero(dataset.labels == person)[:SHEET_IMAGES].tolist()
        images = [Image.fromarray(dataset.read(index)["image"].squeeze()).convert("RGB") for index in taken]
        rows.append([np.asarray(image.resize(size, Image.Resampling.BICUBIC)) for image in images])
        names.append(dataset.label_names[person] + " hard" * bool(dataset.hard[person]))
    return pictures.contact_sheet(rows, names)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: its arguments; None means those of the process.

    Returns:
        The exit code: 0 done, 2 the arguments, the data or the weights are wrong.
    """
    parser = argparse.ArgumentParser(
        prog="python -m train.face_report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--workdir", required=True, metavar="DIR", help="a run of `python -m train`")
    parser.add_argument("--out", required=True, metavar="DIR", help="where the pictures go")
    parser.add_argument("--step", type=int, help="this checkpoint and no other")
    parser.add_argument("--raw", action="store_true", help="not the running averages")
    parser.add_argument("--split", help="such as validation+test, or the run's own")
    arguments, overrides = parser.parse_known_args(argv)
    host.keep_freed_memory()
    host.cache_compiled_programs()
    options = dict(step=arguments.step, raw=arguments.raw, split=arguments.split, overrides=overrides)
    try:
        result = report(arguments.workdir, arguments.out, **options)
    except evaluate.ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(metrics.final_line(result), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
