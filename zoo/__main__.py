"""The zoo on the command line.

    python -m zoo list 'davit*'
    python -m zoo info davit_tiny
    python -m zoo verify davit_tiny.msft_in1k model.safetensors
    python -m zoo convert model.safetensors model.npz --model davit_tiny
    python -m zoo predict davit_tiny.msft_in1k model.safetensors photo.jpg --attention attention.png
    python -m zoo generate yaad_nano runs/text --prompt 'def '
    python -m zoo card davit_tiny.msft_in1k

What was asked for goes to stdout, all else to stderr. The exit code is 0 only if nothing is wrong; 2 says that an
argument or a file is, or that `verify` found something.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from zoo.errors import WeightsError

# Name -> (the module whose `add_arguments(parser)` and `run(arguments)`, which returns the exit code, make the
# command, what it does). Only the module of the command that is run is imported.
COMMANDS = {
    "list": ("zoo.commands.list", "models: their sizes and their published weights"),
    "info": ("zoo.commands.info", "one model, stage by stage: shapes, parameters, MACs"),
    "verify": ("zoo.commands.verify", "hold a weight file against a model"),
    "convert": ("zoo.commands.convert", "write weights in another format or under other names"),
    "predict": ("zoo.commands.predict", "best guesses for pictures, and what the model attends to"),
    "generate": ("zoo.commands.generate", "go on with a text, draw a digit, answer with numbers"),
    "card": ("zoo.commands.card", "the model card of published weights"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: the command and its arguments; None means those of the process.

    Returns:
        The exit code: 0 where nothing is wrong, else what stderr or the report says is.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(
        prog="python -m zoo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(
            name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.", allow_abbrev=False
        )
        if argv[:1] == [name]:
            imported = importlib.import_module(module)
            imported.add_arguments(command)
            command.set_defaults(run=imported.run)
    arguments = parser.parse_args(argv)
    if not argv:
        parser.print_help()
        return 0
    try:
        code = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Whoever read the output has enough of it; what is still buffered has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, TypeError, OSError, NotImplementedError, ImportError, WeightsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
