"""Trains a model: python -m train --config configs/digits.py:davit_nano --workdir runs/digits [--config.KEY=VALUE ...]

Progress goes to stderr; the last line, on stdout, is one JSON object with the final metrics.
"""

import argparse
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: its arguments; None means those of the process.

    Returns:
        The exit code: 0 done, 1 training failed, 2 the settings, the data or the workdir are wrong, 130
        interrupted by the keyboard.
    """
    parser = argparse.ArgumentParser(prog="python -m train", description=__doc__, allow_abbrev=False)
    parser.add_argument("--config", required=True, metavar="FILE:ARG", help="a config file and its argument")
    parser.add_argument("--workdir", required=True, metavar="DIR", help="where the run is kept; goes on if it is there")
    parser.add_argument(
        "--distributed",
        action="store_true",
        help="one of several processes: a TPU pod, or a SLURM or MPI job (see jax.distributed.initialize)",
    )
    arguments, overrides = parser.parse_known_args(argv)

    import jax

    from train import config, evaluate, host, loop, metrics
    from train.checkpoint import CheckpointError

    host.keep_freed_memory()
    if arguments.distributed:
        jax.distributed.initialize()
    host.cache_compiled_programs()
    try:
        run = loop.prepare(config.load(arguments.config, overrides), arguments.workdir)
    except evaluate.ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        result = loop.train(run)
    except (loop.TrainingError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the newest checkpoint", file=sys.stderr)
        return 130
    if jax.process_index() == 0:
        print(metrics.final_line(result), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
