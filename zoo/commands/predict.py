"""`python -m zoo predict`."""

import argparse
import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from zoo.commands import arguments as shared
from zoo.panels import TINY_SIDE
from zoo.pictures import Subject, attention_page, last_blocks
from zoo.prediction import BATCH, Classifier, Prediction, best_guesses, load_classifier, read_image, run_model

# Pictures on a page are drawn from about so many pixels a side where the model sees fewer, unless it sees so few that
# these themselves are what there is to show.
PAGE_SIDE = 448


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="model, or full tag of weights, whose preprocessing is taken")
    parser.add_argument("source", metavar="WEIGHTS", help="weight file, checkpoint directory or a run's directory")
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="picture in any format that PIL reads")
    parser.add_argument("--top", type=_positive, default=5, metavar="N", help="how many guesses (5)")
    parser.add_argument("--labels", metavar="FILE", help="names of all classes in order, one a line")
    parser.add_argument("--attention", metavar="PNG", help="draw what the model attends to into this file")
    parser.add_argument(
        "--token",
        type=_token,
        metavar="ROW,COLUMN",
        help="with --attention: place of the token that attends, each from 0 to 1 (0.5,0.5, the centre)",
    )
    parser.add_argument(
        "--image-size",
        type=shared.image_size,
        metavar="N|HxW",
        help="side of what the model sees in pixels, or height x width; by default what the weights were made for",
    )
    parser.add_argument("--naming", help="whose names the file has, if that is not to be found out; zoo: our own paths")
    parser.add_argument("--weights", choices=("ema", "raw"), help="which weights, where the file holds both (ema)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line, for one picture each")


def run(arguments: argparse.Namespace) -> int:
    """Returns 0, or 1 if a picture could not be read; the others are classified all the same."""
    page = _page_path(arguments)
    names = _read_labels(arguments.labels)
    options = dict(image_size=arguments.image_size, naming=arguments.naming, weights=arguments.weights)
    found = load_classifier(arguments.name, arguments.source, **options)
    if names is not None:
        found = dataclasses.replace(found, labels=names)
    classes = found.model.num_classes
    if not classes and page is None:
        raise ValueError(f"{arguments.name} as loaded has no classifier; all it can do here is --attention")
    if classes and found.labels is not None and len(found.labels) != classes:
        raise ValueError(f"{arguments.labels} has {len(found.labels)} lines; {classes} classes want one each")
    print(f"{arguments.name} from {arguments.source}; {found.preprocessing}", file=sys.stderr)

    # The maps of large models take a gigabyte an image.
    batch = min(len(arguments.images), 1 if page else BATCH)
    subjects, maps, failed = [], [], False
    for start in range(0, len(arguments.images), batch):
        paths = arguments.images[start : start + batch]
        read = [_read(path, found) for path in paths]
        good = [one for one in read if isinstance(one, _Seen)]
        guesses: list[Prediction] = []
        if good:
            seen = found.preprocessing.normalized(np.stack([one.pixels for one in good]))
            logits, attended = run_model(found.model, found.variables, seen, batch=batch, watch=page is not None)
            if classes:
                guesses = best_guesses(logits, top=arguments.top, labels=found.labels)
            maps.append(last_blocks(attended))
        guesses = guesses or [Prediction((), ())] * len(good)
        for path, one in zip(paths, read):
            if isinstance(one, str):
                failed = True
                _fail(path, one, arguments.json)
            else:
                guess = guesses.pop(0)
                _say(path, guess, arguments.json)
                if page:
                    subjects.append(_subject(path, one, guess))
    if page and subjects:
        _draw(page, arguments, found, subjects, maps)
    return int(failed)


@dataclasses.dataclass(frozen=True)
class _Seen:
    """What the model sees of a picture, and the same part of it with more pixels."""

    pixels: np.ndarray
    finer: np.ndarray


def _read(path: str, found: Classifier) -> _Seen | str:
    """The picture, or why there is none."""
    transform = found.preprocessing.transform
    try:
        whole = read_image(path, found.preprocessing.channels)
    except ValueError as error:
        return str(error)
    times = max(1, PAGE_SIDE // max(transform.size)) if max(transform.size) >= TINY_SIDE else 1
    finer = dataclasses.replace(transform, size=tuple(times * side for side in transform.size))
    return _Seen(transform.pixels(whole), finer.pixels(whole))


def _subject(path: str, seen: _Seen, guess: Prediction) -> Subject:
    names = guess.labels or [f"class {number}" for number in guess.classes]
    return Subject(seen.finer, Path(path).name, tuple(zip(names, guess.probabilities)))


def _say(path: str, guess: Prediction, as_json: bool) -> None:
    if not as_json:
        print(path, guess, sep="\n", flush=True)
        return
    labels = guess.labels or (None,) * len(guess.classes)
    rows = zip(guess.classes, labels, guess.probabilities)
    top = [{"class": number, "label": label, "probability": share} for number, label, share in rows]
    print(json.dumps({"image": path, "predictions": top}), flush=True)


def _fail(path: str, message: str, as_json: bool) -> None:
    print(f"error: {message}", file=sys.stderr)
    if as_json:
        print(json.dumps({"image": path, "error": message}), flush=True)


def _draw(
    page: Path,
    arguments: argparse.Namespace,
    found: Classifier,
    subjects: list[Subject],
    maps: list[dict[str, Any]],
) -> None:
    height, width = found.preprocessing.transform.size
    subtitle = f"last block of every stage, {height} x {width} pixels, weights: {Path(arguments.source).name}"
    image = attention_page(
        subjects,
        {path: jax.tree.map(lambda *parts: np.concatenate(parts), *(one[path] for one in maps)) for path in maps[0]},
        title=f"{arguments.name}: what one token attends to",
        subtitle=subtitle,
        token=arguments.token or (0.5, 0.5),
    )
    image.save(page, format="PNG")
    print(f"attention drawn into {page}", file=sys.stderr)


def _page_path(arguments: argparse.Namespace) -> Path | None:
    """Where the page goes; what could be wrong with it is better known before the model has run."""
    if arguments.attention is None:
        if arguments.token is not None:
            raise ValueError("--token says whose attention is drawn; it needs --attention PNG")
        return None
    path = Path(arguments.attention).expanduser()
    if path.suffix.lower() != ".png":
        raise ValueError(f"--attention {path}: the file's name must end with .png")
    if not path.parent.is_dir():
        raise ValueError(f"--attention {path}: there is no directory {path.parent}")
    return path


def _read_labels(path: str | None) -> tuple[str, ...] | None:
    if path is None:
        return None
    try:
        return tuple(Path(path).expanduser().read_text(encoding="utf-8").splitlines())
    except UnicodeDecodeError as error:
        raise ValueError(f"--labels {path}: no text in UTF-8, byte {error.start} cannot be read") from error


def _positive(text: str) -> int:
    if not shared.count(text):
        raise argparse.ArgumentTypeError("must be at least 1")
    return int(text)


def _token(text: str) -> tuple[float, float]:
    number = r"(0?\.\d+|[01](?:\.\d*)?)"
    found = re.fullmatch(rf"{number},{number}", text)
    if not found or max(place := (float(found[1]), float(found[2]))) > 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no ROW,COLUMN with numbers from 0 to 1, such as 0.5,0.25")
    return place
