"""Lists the checkpoints of a run, checks them, and removes what is broken.

    python -m train.checkpoints runs/digits
    python -m train.checkpoints runs/digits --verify
    python -m train.checkpoints runs/digits --repair --dry-run

DIR is a run's workdir, its folder of checkpoints, or a single step. A step is good where all its files are as they were
written (without --verify only their sizes are looked at), damaged where some are not, unfinished where a save was cut
short, and without digests where a save was cut short at its very end: such a step is not trusted either. Not to be used
on a run that is being trained: what is being saved looks unfinished. Exit codes: 0 all steps are good, 1 some are not
(or would not be after --repair), 2 the directory is wrong or cannot be written.
"""

import dataclasses
import datetime
import json
import sys
from collections.abc import Sequence

from etils import epath

from train import commands
from zoo.formats import orbax_dir
from zoo.tables import scaled, table

GOOD, DAMAGED, UNFINISHED, UNDIGESTED = "good", "damaged", "unfinished", "without digests"


class NothingGood(orbax_dir.CheckpointError):
    """No step would be left that can be trusted."""


@dataclasses.dataclass(frozen=True)
class Step:
    """One folder of a directory of checkpoints.

    Attributes:
        folder: its name, the step's number and for what is unfinished mostly more.
        step: the number.
        size: bytes of all files.
        saved: when the last file was written, in seconds since 1970.
        state: one of the four words.
        problems: what is wrong with it, one entry per file.
    """

    folder: str
    step: int
    size: int
    saved: float
    state: str
    problems: tuple[str, ...] = ()


def find(directory: epath.PathLike, *, verify: bool = False) -> tuple[epath.Path, list[Step]]:
    """The steps that a directory holds, by number.

    Args:
        directory: a run's workdir, its folder of checkpoints, or one step of it.
        verify: whether to read every byte.

    Returns:
        The folder of checkpoints, and the steps in it; of one step that alone.

    Raises:
        CheckpointError: there is no such directory, or nothing in it looks like a checkpoint.
        OSError: it cannot be read.
    """
    given = orbax_dir.checkpoint_path(directory)
    if not given.exists():
        raise orbax_dir.CheckpointError(f"{given} does not exist")
    if not given.is_dir():
        raise orbax_dir.CheckpointError(f"{given} is a file; give a run's workdir or its folder of checkpoints")
    place, wanted = orbax_dir.locate(given)
    folders = [child for child in place.iterdir() if _number(child) is not None and child.is_dir()]
    found = [_look(folder, verify) for folder in folders if wanted in (None, _number(folder))]
    if not found:
        raise orbax_dir.CheckpointError(
            f"no checkpoints in {place}: expected folders named by their step, such as 1000"
        )
    return place, sorted(found, key=lambda step: (step.step, step.folder))


def broken(steps: Sequence[Step]) -> list[Step]:
    """The damaged and unfinished ones of verified steps, which can be removed.

    Raises:
        NothingGood: no good step would be left.
    """
    wanted = [step for step in steps if step.state in (DAMAGED, UNFINISHED)]
    if wanted and not any(step.state == GOOD for step in steps):
        raise NothingGood(
            "none of these steps is good; nothing is removed: parts of them may still be of use (restore their files "
            "from a copy, or delete the folders yourself)"
        )
    return wanted


def _number(folder: epath.Path) -> int | None:
    number, dot, suffix = folder.name.partition(".")
    named = not dot or f".{suffix}".startswith(orbax_dir.TEMPORARY)
    return int(number) if number.isdecimal() and named else None


def _look(folder: epath.Path, verify: bool) -> Step:
    size, saved = 0, folder.stat().mtime
    for path in _files(folder):
        stat = path.stat()
        size, saved = size + stat.length, max(saved, stat.mtime)
    about = (folder.name, _number(folder), size, float(saved))
    if not folder.name.isdecimal():
        return Step(*about, UNFINISHED, ("the save was cut short or is still going on",))
    if not (folder / orbax_dir.DIGESTS).exists():
        # Where nothing can be renamed, a file of Orbax's says that all of its own are written.
        if "://" in str(folder) and not (folder / orbax_dir.COMMIT_MARKER).exists():
            return Step(*about, UNFINISHED, (f"{orbax_dir.COMMIT_MARKER} is missing",))
        return Step(*about, UNDIGESTED, (f"{orbax_dir.DIGESTS} is missing",))
    problems = tuple(orbax_dir.problems(folder, contents=verify))
    return Step(*about, DAMAGED if problems else GOOD, problems)


def _files(folder: epath.Path) -> list[epath.Path]:
    return [
        path for child in folder.iterdir() for path in (_files(child) if child.is_dir() else [child]) if path.exists()
    ]


def _columns(steps: Sequence[Step], verified: bool) -> list[str]:
    cells = [("step", "size", "saved", "state")]
    for step in steps:
        saved = datetime.datetime.fromtimestamp(step.saved).strftime("%Y-%m-%d %H:%M:%S")
        shown = "; ".join(step.problems[:3]) + f"; {len(step.problems) - 3} more" * (len(step.problems) > 3)
        sizes_only = " (by size)" * (step.state == GOOD and not verified)
        state = step.state + sizes_only + f": {shown}" * bool(shown)
        cells.append((str(step.step), f"{scaled(step.size)}B", saved, state))
    return table(cells, ">><<")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: its arguments; None means those of the process.

    Returns:
        The exit code: 0 all steps are good, 1 some are not, 2 the directory is wrong or cannot be written.
    """
    parser = commands.parser("train.checkpoints", __doc__)
    parser.add_argument("directory", metavar="DIR", help="a run's workdir, its folder of checkpoints, or one step")
    parser.add_argument("--verify", action="store_true", help="read every byte, not only the sizes")
    parser.add_argument("--repair", action="store_true", help="verify, and remove what is damaged or unfinished")
    parser.add_argument("--dry-run", action="store_true", help="with --repair: only say what would be removed")
    parser.add_argument("--json", action="store_true", help="print one JSON object in place of the table")
    arguments = parser.parse_args(argv)
    if arguments.dry_run and not arguments.repair:
        parser.error("--dry-run is for --repair")
    verify = arguments.verify or arguments.repair
    try:
        place, steps = find(arguments.directory, verify=verify)
        if arguments.json:
            print(
                json.dumps({"directory": str(place), "verified": verify, "steps": list(map(dataclasses.asdict, steps))})
            )
        else:
            print("\n".join(_columns(steps, verify)))
        removed = broken(steps) if arguments.repair else []
        for step in removed:
            print(
                f"{'would remove' if arguments.dry_run else 'removed'} {place / step.folder}: {step.state}, "
                f"{'; '.join(step.problems[:3])}",
                file=sys.stderr,
            )
            if not arguments.dry_run:
                (place / step.folder).rmtree()
    except (orbax_dir.CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, NothingGood) else 2
    left = [step for step in steps if step not in removed or arguments.dry_run]
    return 0 if all(step.state == GOOD for step in left) else 1


if __name__ == "__main__":
    sys.exit(main())
