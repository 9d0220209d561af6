"""Arguments that several commands share."""

import argparse
import re


def image_size(text: str) -> int | tuple[int, int]:
    """`"224"` as a side, `"192x256"` as (height, width)."""
    if not (found := re.fullmatch(r"(\d+)(?:x(\d+))?", text)) or 0 in (sides := [int(n) for n in found.groups("-1")]):
        raise argparse.ArgumentTypeError(f"{text!r} is no size: a side in pixels such as 224, or HEIGHTxWIDTH")
    return sides[0] if sides[1] < 0 else (sides[0], sides[1])


def count(text: str) -> int:
    """A natural number."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no natural number")
    return int(text)


def add_fields(parser: argparse.ArgumentParser) -> None:
    """`--image-size`, `--num-classes` and `--in-chans`."""
    parser.add_argument(
        "--image-size",
        type=image_size,
        metavar="N|HxW",
        help="side of the images in pixels, or height x width; by default what the model or its weights are made for",
    )
    parser.add_argument("--num-classes", type=count, metavar="N", help="classes; 0: no classifier")
    parser.add_argument("--in-chans", type=count, metavar="N", help="channels of the images")


def fields(arguments: argparse.Namespace) -> dict[str, int | tuple[int, int]]:
    """Those of `add_fields` that were given."""
    given = {name: getattr(arguments, name) for name in ("image_size", "num_classes", "in_chans")}
    return {name: value for name, value in given.items() if value is not None}
