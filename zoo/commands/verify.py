"""`python -m zoo verify`."""

import argparse
import sys
from pathlib import Path

import zoo
from zoo.commands import arguments as shared


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="model, or full tag, whose digest and classes are checked too")
    parser.add_argument("source", metavar="WEIGHTS", help="weight file or checkpoint directory")
    parser.add_argument(
        "--reference",
        metavar="FILE.npz",
        help="images (B, H, W, C), normalised, and the logits that are right for them; optional atol (1e-4)",
    )
    shared.add_fields(parser)
    parser.add_argument("--naming", help="whose names the file has, if that is not to be found out; zoo: our own paths")
    parser.add_argument("--weights", choices=("ema", "raw"), help="which weights, where the file holds both (ema)")
    parser.add_argument("--json", metavar="FILE|-", help="write the report as JSON too; - : to stdout, in its place")


def run(arguments: argparse.Namespace) -> int:
    report = zoo.verify(
        arguments.name,
        arguments.source,
        reference=arguments.reference,
        naming=arguments.naming,
        weights=arguments.weights,
        **shared.fields(arguments),
    )
    print(report.to_json() if arguments.json == "-" else report)
    if arguments.json not in (None, "-"):
        Path(arguments.json).expanduser().write_text(report.to_json() + "\n")
        print(f"written to {arguments.json}", file=sys.stderr)
    return 0 if report.passed else 2
