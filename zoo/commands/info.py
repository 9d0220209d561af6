"""`python -m zoo info`."""

import argparse

import zoo
from zoo.commands import arguments as shared


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="model such as davit_tiny, or full tag of weights")
    shared.add_fields(parser)
    parser.add_argument("--batch", type=shared.count, default=1, metavar="N", help="images at once (1)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")


def run(arguments: argparse.Namespace) -> int:
    info = zoo.model_info(arguments.name, batch=arguments.batch, **shared.fields(arguments))
    print(info.to_json() if arguments.json else info)
    return 0
