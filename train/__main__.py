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
        The exit code: 0 done, 1 training failed, 2 the settings, the data or the workdir are wrong, 3 another of
        several processes was lost, 130 interrupted by the keyboard, 143 stopped by SIGTERM. After 3, 130 and 143 the
        same command goes on: after 143 from the step in which the signal came, else from the newest checkpoint.
    """
    parser = argparse.ArgumentParser(prog="python -m train", description=__doc__, allow_abbrev=False)
    parser.add_argument("--config", required=True, metavar="FILE:ARG", help="a config file and its argument")
    parser.add_argument("--workdir", required=True, metavar="DIR", help="where the run is kept; goes on if it is there")
    parser.add_argument(
        "--distributed",
        action="store_true",
        help="one of several processes: a TPU pod, a SLURM or MPI job, or as the three options below say",
    )
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0, which listens there")
    parser.add_argument("--num-processes", type=int, metavar="N", help="how many processes train together")
    parser.add_argument("--process-id", type=int, metavar="I", help="which one this is, from 0 on")
    arguments, overrides = parser.parse_known_args(argv)

    together = (arguments.coordinator, arguments.num_processes, arguments.process_id)
    if not arguments.distributed and together != (None, None, None):
        parser.error("--coordinator, --num-processes and --process-id need --distributed")

    import jax

    from train import config, evaluate, host, loop, metrics, preemption, processes
    from train.checkpoint import CheckpointError

    host.keep_freed_memory()
    try:
        if arguments.distributed:
            processes.join(*together)
        host.cache_compiled_programs()
        run = loop.prepare(config.load(arguments.config, overrides), arguments.workdir)
    except evaluate.ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    with preemption.Notice() as notice:
        try:
            result = loop.train(run, notice)
        except (loop.TrainingError, CheckpointError, OSError) as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            if jax.process_count() > 1 and not isinstance(error, loop.NotFinite):
                processes.leave(1)
            return 1
        except KeyboardInterrupt:
            print("interrupted; the same command goes on from the newest checkpoint", file=sys.stderr)
            return 130
        except preemption.Preempted as stopped:
            print(stopped, file=sys.stderr)
            return preemption.EXIT_CODE
        except jax.errors.JaxRuntimeError as error:
            if jax.process_count() == 1:
                raise
            processes.end(str(error) or type(error).__name__)
    if jax.process_index() == 0:
        print(metrics.final_line(result), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
