"""`python -m zoo card`."""

import argparse
import sys
from pathlib import Path

import zoo


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("tag", metavar="TAG", help="full tag of weights, such as davit_tiny.msft_in1k")
    parser.add_argument("--output", metavar="FILE", help="write it there instead of to stdout")


def run(arguments: argparse.Namespace) -> int:
    card = zoo.model_card(arguments.tag)
    if arguments.output is None:
        print(card, end="")
    else:
        Path(arguments.output).expanduser().write_text(card)
        print(f"written to {arguments.output}", file=sys.stderr)
    return 0
