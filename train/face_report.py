"""Scores a verification run and draws what came out: ROC curves, histograms of scores, faces, what the model looks at.

    python -m train.face_report --workdir runs/twins --out runs/twins/pictures

Writes `roc.png`, `scores.png` and `faces.png`, and, of models with streams of parts or of asymmetry, `maps.png`.
What is printed on stdout is one line of JSON with the metrics.
"""

import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from PIL import Image

import zoo
from train import commands, evaluate, host, inputs, metrics, verification_metrics
from train import verification_pictures as pictures
from train.face_set import FaceSet
from train.mixing import normalize
from zoo.part_maps import AsymmetryMap, PartMap

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
    run = evaluate.score_faces(workdir, step=step, raw=raw, split=split, overrides=overrides)
    directory = epath.Path(out)
    directory.mkdir(parents=True, exist_ok=True)
    title = f"{run.config.model.name}, step {run.step:,}: {run.dataset.name}"
    drawn = {
        "roc": pictures.roc_picture(run.scored, title),
        "scores": pictures.score_picture(run.scored, title),
        "faces": face_sheet(run.dataset),
        "maps": map_sheet(run, title),
    }
    for name, image in drawn.items():
        if image is not None:
            with (directory / f"{name}.png").open("wb") as file:
                image.save(file, format="png")
    return {"step": run.step, **verification_metrics.summary(run.scored, replicates=run.task.replicates)}


def map_sheet(run: evaluate.ScoredFaces, title: str) -> Image.Image | None:
    """What a model's parts look at, and where it finds the halves to differ, on faces of the last twins.

    None for a model without such maps.
    """
    people = _shown(run.dataset)
    rows = [np.flatnonzero(run.dataset.labels == person)[0] for person in people]
    transform = inputs.eval_transform(run.config, run.dataset)
    faces = np.stack([transform(run.dataset.read(int(row)))["image"] for row in rows])
    normalized = normalize(jnp.asarray(faces), run.task.mean, run.task.std).astype(run.task.dtype)
    maps = jax.device_get(zoo.attention_maps(run.model, run.variables, normalized))
    parts = next((found for found in maps.values() if isinstance(found, PartMap)), None)
    asymmetry = next((found for found in maps.values() if isinstance(found, AsymmetryMap)), None)
    if parts is None and asymmetry is None:
        return None
    return pictures.map_picture(faces, _names(run.dataset, people), parts, asymmetry, title)


def _shown(dataset: FaceSet) -> list[int]:
    """The last pairs of twins; where there are none, the last people."""
    everyone = range(dataset.num_classes)
    return dataset.pairs[-SHEET_PAIRS:].ravel().tolist() or list(everyone)[-2 * SHEET_PAIRS :]


def _names(dataset: FaceSet, people: Sequence[int]) -> list[str]:
    return [dataset.label_names[person] + " hard" * bool(dataset.hard[person]) for person in people]


def face_sheet(dataset: FaceSet, size: tuple[int, int] = (96, 96)) -> Image.Image:
    """Pictures of the people of `_shown`, a person a row, resized to `size` (width, height)."""
    rows, people = [], _shown(dataset)
    for person in people:
        taken = np.flatnonzero(dataset.labels == person)[:SHEET_IMAGES].tolist()
        images = [Image.fromarray(dataset.read(index)["image"].squeeze()).convert("RGB") for index in taken]
        rows.append([np.asarray(image.resize(size, Image.Resampling.BICUBIC)) for image in images])
    return pictures.contact_sheet(rows, _names(dataset, people))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: its arguments; None means those of the process.

    Returns:
        The exit code: 0 done, 2 the arguments, the data or the weights are wrong.
    """
    parser = commands.parser("train.face_report", __doc__)
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
