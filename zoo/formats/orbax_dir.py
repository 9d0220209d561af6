"""Checkpoint directories of the train loop: the digests that make a step trustworthy, its arrays as numpy.

Such a directory holds one folder per saved step, named by its number. Orbax writes the folder: `state` (a tree
of arrays), and as JSON `data`, `config` and `leaves` (dtypes and shapes by path). Orbax commits a folder as a
whole, but it does not notice a flipped bit in an array, and a missing piece only when it fails on it. So
`digests.json` in the folder lists size and xxh3-128 digest of every other file. It is written last: a folder
without it was not finished and is not trusted.
"""

from __future__ import annotations

import functools
import json
import logging
import sys
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from etils import epath

DIGESTS = "digests.json"

_ALGORITHM = "xxh3-128"
_BLOCK = 4 << 20
_SMALL = 1 << 20
_THREADS = 8

# What Orbax's temporary folders have in their names, and the file that commits a folder where nothing is renamed.
TEMPORARY = ".orbax-checkpoint-tmp"
COMMIT_MARKER = "commit_success.txt"

T = TypeVar("T")


class CheckpointError(Exception):
    """A checkpoint could not be written, or none of those that exist can be trusted."""


class DamagedStep(CheckpointError):
    """The files of one step are not as they were written.

    Attributes:
        problems: what is wrong, one entry per file, each beginning with the file's name in the step's folder.
    """

    def __init__(self, step: int, problems: list[str]):
        shown = "; ".join(problems[:3]) + (f"; {len(problems) - 3} more" if len(problems) > 3 else "")
        super().__init__(f"step {step}: {shown}")
        self.problems = problems


@functools.cache
def import_orbax() -> Any:
    """Returns the module `orbax.checkpoint`, imported on first use and silenced.

    Importing it takes up to a second, which `import zoo` should not. It logs, with tracebacks, the errors that it
    raises as well, and the terminal belongs to the train loop.
    """
    import orbax.checkpoint as ocp

    logging.getLogger("absl").addFilter(lambda record: "/orbax/checkpoint/" not in record.pathname)
    # Of a write that fails in many pieces, asyncio logs each with its traceback when it is collected.
    logging.getLogger("asyncio").addFilter(lambda record: "/orbax/checkpoint/" not in record.getMessage())
    return ocp


def checkpoint_path(directory: epath.PathLike) -> epath.Path:
    """Returns `directory` as the absolute path that Orbax asks for; a URL such as `gs://bucket` is one."""
    path = epath.Path(directory).expanduser()
    return path if path.is_absolute() else path.resolve()


def can_rename(directory: epath.Path) -> bool:
    """Whether a directory renames folders that hold files, as steps do; `OSError` if nothing can be written."""
    before, after = directory / "probe", directory / "probe-renamed"
    try:
        before.mkdir(exist_ok=True)
        (before / "file").write_text("")
        if "://" in str(directory):
            return False
        try:
            before.rename(after)
        except (OSError, NotImplementedError):
            return False
        return True
    finally:
        for folder in (before, after):
            if folder.exists():
                folder.rmtree()


def locate(path: epath.Path) -> tuple[epath.Path, int | None]:
    """The directory of checkpoints that a run's directory, that directory itself or one of its steps stands for.

    Returns:
        The directory and the step, None where `path` is not that of a step.
    """
    if path.name.isdecimal() and (path / "state").is_dir():
        return path.parent, int(path.name)
    inside = path / "checkpoints"
    return (inside if inside.is_dir() else path), None


def list_steps(directory: epath.PathLike) -> list[int]:
    """Returns the numbers of the step folders in `directory`, ascending, good or not; none if it is absent."""
    try:
        return sorted(int(child.name) for child in epath.Path(directory).iterdir() if child.name.isdecimal())
    except FileNotFoundError:
        return []


def write_digests(step_dir: epath.PathLike) -> None:
    """Hashes every file of a committed step and writes their list into it.

    One plain write, since object stores know neither rename nor append. Where such a write can be cut short, the
    list does not match its own digest, and a reader trusts it no more than none.
    """
    root = epath.Path(step_dir)
    # One after the other: a thread that outlives the main one cannot start others.
    files = {name: _hash(root / name) for name in _files(root) if name != DIGESTS}
    (root / DIGESTS).write_bytes(_encode(files))


def verified(step_dir: epath.PathLike, read: Callable[[], T]) -> T:
    """Runs `read` while the files of a step are hashed and returns its value if every file is as written.

    Sizes and small files are checked first: they hold shapes and offsets, and a flipped digit there could make
    the reader ask for any amount of memory. Files that the list does not name are not looked at.

    Args:
        step_dir: the folder of one step.
        read: reads what the caller wants from that folder. What it raises counts only if the files are good.

    Raises:
        DamagedStep: naming each file that is missing, of another size, or of another content.
    """
    root = epath.Path(step_dir)
    step = int(root.name)
    files = _decode(root)
    small = [name for name, (size, _) in files.items() if size < _SMALL]
    failure = None
    with ThreadPoolExecutor(_THREADS) as pool:

        def problems(check: Callable[[epath.Path, str, Any], str | None], names: Iterable[str]) -> list[str]:
            return [found for found in pool.map(lambda name: check(root, name, files[name]), names) if found]

        if found := problems(_size_problem, files) or problems(_content_problem, small):
            raise DamagedStep(step, found)
        hashing = [pool.submit(_content_problem, root, name, files[name]) for name in files.keys() - set(small)]
        try:
            value = read()
        except Exception as error:
            failure = error
        found = sorted(found for future in hashing if (found := future.result()))
    if found:
        raise DamagedStep(step, found) from failure
    if failure is not None:
        raise failure
    return value


def problems(step_dir: epath.PathLike, *, contents: bool) -> list[str]:
    """What is wrong with the files of a step, one entry per file as in `DamagedStep`; empty if nothing is.

    Args:
        step_dir: the folder of one step, with its digests.
        contents: whether every byte is read, or only `digests.json` and the sizes.
    """
    root = epath.Path(step_dir)
    try:
        files = _decode(root)
    except DamagedStep as error:
        return error.problems
    with ThreadPoolExecutor(_THREADS) as pool:
        found = list(pool.map(lambda name: _size_problem(root, name, files[name]), files))
        if contents:
            good = [name for name, problem in zip(files, found) if problem is None]
            found += pool.map(lambda name: _content_problem(root, name, files[name]), good)
    return sorted(problem for problem in found if problem)


def newest_good(
    directory: epath.PathLike, attempt: Callable[[int], T], step: int | None = None
) -> tuple[int, T] | None:
    """Tries the steps of a directory from the newest on and returns the first that is not damaged.

    Each damaged step that is passed over is named, with its reason, in one line on stderr.

    Args:
        directory: where the step folders are.
        attempt: reads one step; `DamagedStep` sends the search on, any other exception ends it.
        step: try only this one.

    Returns:
        The step and what `attempt` returned for it, or None if `step` is None and there are no steps at all.

    Raises:
        CheckpointError: there are steps, but none is good; or `step` does not exist or is damaged.
    """
    steps = list_steps(directory)
    if step is not None:
        if step not in steps:
            raise CheckpointError(f"no checkpoint of step {step} in {directory}; there are {steps or 'none'}")
        try:
            return step, attempt(step)
        except DamagedStep as error:
            raise CheckpointError(f"the checkpoint in {directory} is damaged: {error}") from error
    reasons = []
    for candidate in reversed(steps):
        try:
            return candidate, attempt(candidate)
        except DamagedStep as error:
            report(f"checkpoint skipped in {directory}: {error}")
            reasons.append(str(error))
    if reasons:
        raise CheckpointError(
            f"none of the {len(steps)} checkpoints in {directory} can be trusted; start in another directory "
            f"or restore these files from a copy:\n  " + "\n  ".join(reasons)
        )
    return None


def read_state(
    directory: epath.PathLike, step: int | None = None, only: Iterable[str] | None = None
) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """Reads a step without knowing the model or the optimizer that wrote it.

    Args:
        directory: the checkpoint directory of a run.
        step: which step; the newest good one if None, as `newest_good` picks it.
        only: top-level names of the state to read, such as `("params", "batch_stats", "ema")`. Names that the
            checkpoint does not have are absent from the result. Everything is read if None.

    Returns:
        The step, the state and the config. In the state, containers are dicts and lists, and leaves numpy arrays
        of the saved shapes and dtypes, PRNG keys their uint32 data; empty containers and None are as they were.

    Raises:
        CheckpointError: there is no step, none is good, or the one that was asked for is not.
    """
    root = checkpoint_path(directory)
    only = None if only is None else tuple(only)

    def attempt(number: int) -> tuple[dict[str, Any], dict[str, Any]]:
        path = root / str(number)
        return verified(path, lambda: (_read_arrays(path / "state", only), read_json(path / "config")))

    found = newest_good(root, attempt, step)
    if found is None:
        raise CheckpointError(f"no checkpoints in {root}: expected folders named by their step, such as 1000")
    number, (state, config) = found
    return number, state, config


def read_json(item_dir: epath.PathLike) -> Any:
    """Returns the content of a JSON item of a step: `data`, `config` or `leaves`."""
    return import_orbax().JsonCheckpointHandler().restore(epath.Path(item_dir))


def report(line: str) -> None:
    """Tells the person at the terminal; stdout is for the result of a program."""
    print(line, file=sys.stderr, flush=True)


def _read_arrays(item_dir: epath.Path, only: tuple[str, ...] | None) -> dict[str, Any]:
    import jax
    import numpy as np

    ocp = import_orbax()
    handler = ocp.PyTreeCheckpointHandler()
    tree = handler.metadata(item_dir).tree
    if only is not None:
        tree = {name: subtree for name, subtree in tree.items() if name in only}
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    return handler.restore(
        item_dir, args=ocp.args.PyTreeRestore(item=tree, restore_args=as_numpy, partial_restore=True)
    )


def _files(root: epath.Path, prefix: str = "") -> list[str]:
    names = []
    for child in sorted(root.iterdir(), key=lambda path: path.name):
        name = prefix + child.name
        names += _files(child, name + "/") if child.is_dir() else [name]
    return names


def _hash(path: epath.Path) -> tuple[int, str]:
    import xxhash

    digest, size = xxhash.xxh3_128(), 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            size += len(block)
    return size, digest.hexdigest()


def _encode(files: Mapping[str, tuple[int, str] | list]) -> bytes:
    import xxhash

    listed = {name: list(entry) for name, entry in files.items()}
    own = xxhash.xxh3_128(json.dumps(listed, sort_keys=True).encode()).hexdigest()
    content = {"algorithm": _ALGORITHM, "digest_of_files": own, "files": listed}
    return json.dumps(content, sort_keys=True, indent=1).encode()


def _decode(root: epath.Path) -> dict[str, list]:
    step = int(root.name)
    try:
        raw = (root / DIGESTS).read_bytes()
    except FileNotFoundError:
        problem = f"{DIGESTS} is missing: the save was cut short or is still going on"
        raise DamagedStep(step, [problem]) from None
    except OSError as error:
        raise DamagedStep(step, [f"{DIGESTS} cannot be read: {error}"]) from error
    try:
        files = json.loads(raw)["files"]
        intact = raw == _encode(files)
    except (ValueError, TypeError, KeyError, AttributeError):
        intact = False
    if not intact:
        raise DamagedStep(step, [f"{DIGESTS} is not as written"])
    return files


def _size_problem(root: epath.Path, name: str, expected: list) -> str | None:
    try:
        size = (root / name).stat().length
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read: {error}"
    return None if size == expected[0] else f"{name} has {size} bytes instead of {expected[0]}"


def _content_problem(root: epath.Path, name: str, expected: list) -> str | None:
    try:
        intact = list(_hash(root / name)) == expected
    except OSError as error:
        return f"{name} cannot be read: {error}"
    return None if intact else f"{name} differs from its {_ALGORITHM} digest"
