"""`python -m zoo convert`."""

import argparse

import zoo
from zoo.commands import arguments as shared
from zoo.conversion import DTYPES
from zoo.formats.writers import SUFFIXES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        metavar="SRC",
        help="safetensors, npz or torch file, checkpoint directory of the train loop, TensorFlow checkpoint",
    )
    parser.add_argument(
        "destination",
        metavar="DST",
        help=f"a file ending in {', '.join(SUFFIXES)}; without an ending a checkpoint directory (Orbax)",
    )
    parser.add_argument("--model", required=True, metavar="NAME", help="whose weights they are: model or full tag")
    parser.add_argument(
        "--naming",
        help="whose names the tensors get, such as timm, official, tensorflow; zoo: our own paths (those of SRC)",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="of floating tensors (their own: nothing is rounded)")
    parser.add_argument("--weights", choices=("ema", "raw"), help="which, where SRC holds both (ema)")
    parser.add_argument(
        "--image-size", type=shared.image_size, metavar="N|HxW", help="size of the model's images, where it matters"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace DST if it is there")


def run(arguments: argparse.Namespace) -> int:
    report = zoo.convert(
        arguments.model,
        arguments.source,
        arguments.destination,
        naming=arguments.naming,
        dtype=arguments.dtype,
        weights=arguments.weights,
        overwrite=arguments.overwrite,
        image_size=arguments.image_size,
    )
    print(report)
    return 0
