"""`python -m zoo generate`."""

import argparse
import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from zoo.commands import arguments as shared
from zoo.prediction import DIGITS_SIDE
from zoo.sequence.generation import TrainedLanguageModel, load_language_model, stream
from zoo.sequence.writing import BEGIN, END, PADDING, SPECIAL, NumberWriter, PixelWriter, TextWriter, Writer

TOKENS = 200
TEMPERATURE = 0.8
# Data whose tokens are the numbers of a source, to be written down again.
TRANSDUCTIONS = ("copy", "sort")
RASTER = "raster:"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="sequence model, or full tag of weights")
    parser.add_argument("path", metavar="WEIGHTS", help="a run's directory, checkpoint directory or weight file")
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument(
        "--prompt", metavar="TEXT", help="what is to be gone on with; of a model of pixels their levels"
    )
    prompt.add_argument("--prompt-file", metavar="FILE", help="a file that holds it")
    parser.add_argument("--source", metavar="NUMBERS", help='of an encoder-decoder: what it reads, such as "3 1 2"')
    parser.add_argument(
        "--tokens",
        type=_positive,
        metavar="N",
        help=f"how many are to follow ({TOKENS}; of an image all that it lacks)",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        metavar="T",
        help=f"below 1 more probable tokens are preferred, 0 takes the most probable ({TEMPERATURE}; of numbers 0)",
    )
    parser.add_argument("--top-k", type=_positive, metavar="N", help="draw from the N most probable tokens only")
    parser.add_argument(
        "--top-p", type=float, metavar="P", help="draw from the fewest tokens that are together this probable (0 to 1)"
    )
    parser.add_argument("--seed", type=shared.count, default=0, metavar="N", help="of the random numbers (0)")
    parser.add_argument("--samples", type=_positive, default=1, metavar="N", help="how many continuations (1)")
    parser.add_argument(
        "--tokenizer", metavar="bytes|FILE", help="of the text: a .json or .model file; by default that of the run"
    )
    parser.add_argument("--naming", help="whose names the file has, if that is not to be found out; zoo: our own paths")
    parser.add_argument("--weights", choices=("ema", "raw"), help="which weights, where the file holds both (ema)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line, for one continuation each")


@dataclasses.dataclass(frozen=True)
class _Task:
    """What is to be generated.

    Attributes:
        prompt: int32 (N,).
        steps: how many tokens are to follow.
        writer: makes what shows a row's tokens.
        given: the prompt or source for JSON.
        head: the prompt as it is shown.
        inputs: what the model takes beside, for one row.
        temperature: where none is asked for.
    """

    prompt: np.ndarray
    steps: int
    writer: Callable[[], Writer]
    given: dict[str, Any]
    head: str = ""
    inputs: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    temperature: float = TEMPERATURE


def run(arguments: argparse.Namespace) -> int:
    options = dict(tokenizer=arguments.tokenizer, naming=arguments.naming, weights=arguments.weights)
    prompt = _prompt(arguments)
    found = load_language_model(arguments.name, arguments.path, **options)
    if found.data in TRANSDUCTIONS:
        task = _numbers(found, prompt, arguments)
    elif arguments.source is not None:
        raise ValueError(f"--source is what an encoder reads, and {arguments.name} has none; give a --prompt")
    elif found.data.startswith(RASTER):
        task = _pixels(found, prompt, arguments)
    else:
        task = _text(found, prompt, arguments)
    print(f"{arguments.name} from {arguments.path}", file=sys.stderr)
    if (total := len(task.prompt) + task.steps) > found.model.length + 1:
        print(f"{total} tokens are more than the {found.model.length} that the model is made for", file=sys.stderr)

    tokens = stream(
        found.model,
        found.variables,
        np.tile(task.prompt, (arguments.samples, 1)),
        steps=task.steps,
        key=jax.random.key(arguments.seed),
        temperature=task.temperature if arguments.temperature is None else arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        **{name: np.tile(value, (arguments.samples, 1)) for name, value in task.inputs.items()},
    )
    print(
        f"compiled in {tokens.compile_seconds:.2f} s; {len(task.prompt)} tokens of prompt in "
        f"{tokens.prompt_seconds:.3f} s",
        file=sys.stderr,
    )
    started = time.perf_counter()
    if arguments.samples == 1 and not arguments.json:
        writer = task.writer()
        print(task.head, end="", flush=True)
        for piece in tokens.pieces:
            print(writer.add(piece[0]), end="", flush=True)
        print(writer.end())
    else:
        rows = np.concatenate(list(tokens.pieces), axis=1)
        for number, row in enumerate(rows):
            _say(task, row, f"{number + 1} of {len(rows)}", arguments.json)
    seconds = time.perf_counter() - started
    # The first token came with the prompt.
    made = arguments.samples * (task.steps - 1)
    print(f"{made} tokens more in {seconds:.2f} s, {made / seconds:,.0f} a second", file=sys.stderr)
    return 0


def _say(task: _Task, tokens: np.ndarray, number: str, as_json: bool) -> None:
    """One of several continuations."""
    writer = task.writer()
    text = task.head + writer.add(tokens) + writer.end()
    if as_json:
        print(json.dumps({**task.given, **writer.found(), "tokens": tokens.tolist()}))
    else:
        print(f"--- {number}", text, sep="\n")


def _text(found: TrainedLanguageModel, prompt: bytes | None, arguments: argparse.Namespace) -> _Task:
    tokenizer = found.tokenizer
    if tokenizer is None:
        data = f"was trained on {found.data!r}" if found.data else "comes with no tokenizer that fits"
        raise ValueError(
            f"{arguments.name} from {arguments.path} {data}; text is generated by models of text, whose tokenizer "
            f"--tokenizer names, digits by those of {RASTER}digits, numbers by those of {' and '.join(TRANSDUCTIONS)}"
        )
    prompt = prompt or b""
    tokens = np.concatenate([np.asarray([tokenizer.begin], np.int32), tokenizer.encode(prompt)])
    text = prompt.decode(errors="replace")
    return _Task(
        prompt=tokens,
        steps=arguments.tokens or TOKENS,
        writer=lambda: TextWriter(tokenizer, tokens),
        given={"prompt": text},
        head=text,
    )


def _pixels(found: TrainedLanguageModel, prompt: bytes | None, arguments: argparse.Namespace) -> _Task:
    """An image, of which the prompt are the first pixels."""
    levels, total = found.model.vocab_size - 1, _raster_length(found)
    side = math.isqrt(total)
    if side * side != total:
        raise ValueError(f"{arguments.name} makes images of {total} pixels, which is no square to be shown")
    pixels = _read_numbers("--prompt", (prompt or b"").decode(errors="replace"), levels - 1)
    if len(pixels) >= total:
        raise ValueError(f"--prompt has {len(pixels)} pixels; an image has {total}, of which some must be missing")
    steps = arguments.tokens or total - len(pixels)
    if steps > total - len(pixels):
        raise ValueError(f"--tokens must be at most {total - len(pixels)}, what the image lacks; got {steps}")
    return _Task(
        prompt=np.asarray([levels, *pixels], np.int32),
        steps=steps,
        writer=lambda: PixelWriter(side, levels, pixels),
        given={"prompt": pixels},
    )


def _raster_length(found: TrainedLanguageModel) -> int:
    """Pixels of an image, which the config does not say."""
    return DIGITS_SIDE**2 if found.data == f"{RASTER}digits" else found.model.length


def _numbers(found: TrainedLanguageModel, prompt: bytes | None, arguments: argparse.Namespace) -> _Task:
    """A task with a source, laid out as in training: the source, its end, and padding."""
    if prompt is not None:
        raise ValueError(f"{arguments.name} was trained on {found.data!r}: it takes --source, and no prompt")
    if arguments.source is None:
        raise ValueError(f'{arguments.name} was trained on {found.data!r}: give it --source, such as "3 1 2"')
    length = found.model.length
    numbers = _read_numbers("--source", arguments.source, found.model.vocab_size - SPECIAL - 1)
    if not 1 <= len(numbers) < length:
        raise ValueError(f"--source must have from 1 to {length - 1} numbers, got {len(numbers)}")
    source = np.full(length, PADDING, np.int32)
    source[: len(numbers) + 1] = [*(SPECIAL + number for number in numbers), END]
    return _Task(
        prompt=np.asarray([BEGIN], np.int32),
        steps=arguments.tokens or length,
        writer=NumberWriter,
        given={"source": numbers},
        inputs={"source": source, "source_mask": np.arange(length) <= len(numbers)},
        temperature=0.0,
    )


def _read_numbers(option: str, text: str, largest: int) -> list[int]:
    words = text.replace(",", " ").split()
    for word in words:
        if not word.isdecimal() or int(word) > largest:
            raise ValueError(
                f'{option} must be numbers from 0 to {largest}, such as "{min(3, largest)} 1"; got {word!r}'
            )
    return [int(word) for word in words]


def _prompt(arguments: argparse.Namespace) -> bytes | None:
    if arguments.prompt_file is not None:
        return Path(arguments.prompt_file).expanduser().read_bytes()
    # What the shell handed over that was no UTF-8 comes back as it was.
    return None if arguments.prompt is None else arguments.prompt.encode(errors="surrogateescape")


def _positive(text: str) -> int:
    if not shared.count(text):
        raise argparse.ArgumentTypeError("must be at least 1")
    return int(text)
