"""Writes variables as a checkpoint directory like the train loop's, of one step: all of it or nothing."""

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zoo.formats.orbax_dir import DIGESTS, import_orbax, write_digests

STEP = 0


def write_checkpoint(directory: str | os.PathLike, variables: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Writes step 0 of a checkpoint directory, from which `zoo.formats.orbax_dir.read_state` reads.

    Args:
        directory: a path on a disk. A present one is replaced once the new one is complete, see `holds_steps_only`.
        variables: nested dicts of numpy arrays, among them `params`.
        config: JSON, kept beside them.

    Raises:
        OSError: where it cannot be written; nothing is left behind then.
    """
    path = Path(directory).absolute()
    state = {
        "params": variables["params"],
        "model_state": {kind: tree for kind, tree in variables.items() if kind != "params"},
        "ema": {},
    }
    try:
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
    except OSError as error:
        raise type(error)(error.errno, f"cannot create a directory here: {error.strerror}", str(path.parent)) from None
    try:
        _save(temporary / "new" / str(STEP), state, config)
        if path.exists():
            path.rename(temporary / "old")
        (temporary / "new").rename(path)
    finally:
        if (temporary / "old").exists() and not path.exists():
            (temporary / "old").rename(path)
        shutil.rmtree(temporary)


def holds_steps_only(directory: Path) -> bool:
    """Whether a directory is empty or a checkpoint directory, with nothing in it but finished steps."""
    return all(child.name.isdecimal() and (child / DIGESTS).is_file() for child in directory.iterdir())


def _save(step: Path, state: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    ocp = import_orbax()
    handler = ocp.CompositeCheckpointHandler(
        state=ocp.PyTreeCheckpointHandler(use_compression=False), config=ocp.JsonCheckpointHandler()
    )
    with ocp.Checkpointer(handler) as checkpointer:
        items = ocp.args.Composite(state=ocp.args.PyTreeSave(state), config=ocp.args.JsonSave(dict(config)))
        checkpointer.save(step, args=items)
    write_digests(step)
