"""Checkpoints of a run: saved in the background, trusted only with their digests, placed on any mesh.

Orbax's asynchronous checkpointer writes and commits a step; a thread of ours then has process 0 list the digests
of its files and only after that delete the oldest steps, so that a kill at any moment leaves a step that can be
trusted. (Orbax's `CheckpointManager` deletes the old step as soon as the new one is committed, and raises the
error of a failed save once more at the next.)
"""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from train import leaves
from zoo.formats.orbax_dir import (
    COMMIT_MARKER,
    DIGESTS,
    TEMPORARY,
    CheckpointError,
    DamagedStep,
    can_rename,
    checkpoint_path,
    import_orbax,
    list_steps,
    newest_good,
    read_json,
    read_state,
    report,
    verified,
    write_digests,
)

__all__ = ["CheckpointError", "Checkpoints", "Restored", "read_state"]

_CANNOT_WRITE, _RENAME_COMMITS, _MARKER_COMMITS = range(3)
_NO_STEP, _NO_GOOD_STEP = -1, -2


@dataclasses.dataclass(frozen=True)
class Restored:
    """What `Checkpoints.restore` found.

    Attributes:
        step: the number that the step was saved under.
        state: a tree like the abstract state, of jax arrays placed by its shardings.
        data: the position in the data, as it was saved.
        config: the configuration of the run, as it was saved.
    """

    step: int
    state: Any
    data: dict[str, Any]
    config: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run in one directory, which no other run writes to at the same time.

    Every process of a distributed run makes the same calls in the same order. To be closed, or used in a `with`
    statement: what is still being written when the program ends is lost.

    Args:
        directory: where the step folders go, a local path or a URL such as `gs://bucket/run`. Created if absent;
            what a killed save left there is removed.
        every_steps: `should_save` is true at multiples of this.
        keep: how many of the newest steps stay, at least 1.
        async_: whether `save` returns once the arrays have left the devices, or only when all is written.

    Raises:
        ValueError: `every_steps` or `keep` is below 1.
        CheckpointError: the directory cannot be created or written.
    """

    def __init__(self, directory: epath.PathLike, *, every_steps: int, keep: int, async_: bool = True):
        for name, value in (("every_steps", every_steps), ("keep", keep)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self._directory = checkpoint_path(directory)
        self._every_steps = every_steps
        self._keep = keep
        self._async = async_
        self._good: set[int] = set()
        self._bad: set[int] = set()
        self._thread: threading.Thread | None = None
        self._failure: tuple[int, BaseException] | None = None
        self._writer = jax.process_index() == 0
        self._renames = self._prepare_directory()

        ocp = import_orbax()
        commit_by = ocp.path.atomicity
        temporary = commit_by.AtomicRenameTemporaryPath if self._renames else commit_by.CommitFileTemporaryPath
        # Weights hardly compress: with zstd a save of 1 GB took five times as long and a restore three times.
        state_handler = ocp.PyTreeCheckpointHandler(use_compression=False)
        registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
        registry.add("state", ocp.args.PyTreeSave, state_handler)
        registry.add("state", ocp.args.PyTreeRestore, state_handler)
        # Where Orbax fails to create the folders in the background, it waits five minutes for them at the exit.
        options = ocp.options.AsyncOptions(create_directories_asynchronously=False)
        self._handler = ocp.CompositeCheckpointHandler(
            handler_registry=registry,
            composite_options=ocp.CompositeOptions(async_options=options, temporary_path_class=temporary),
        )
        self._checkpointer = ocp.AsyncCheckpointer(self._handler, async_options=options, temporary_path_class=temporary)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        """Closes; an exception that is on its way goes before the failure of a save, which is then printed."""
        if kind is not None and issubclass(kind, jax.errors.JaxRuntimeError) and jax.process_count() > 1:
            return  # Closing would meet the other processes, of which one is gone.
        try:
            self.close()
        except CheckpointError as error:
            if kind is None:
                raise
            report(str(error))

    def should_save(self, step: int) -> bool:
        """Whether `step` is due: a multiple of `every_steps` that was neither saved nor restored here."""
        return step % self._every_steps == 0 and step not in self._good

    def save(
        self,
        step: int,
        state: Any,
        *,
        data: Mapping[str, Any],
        config: Mapping[str, Any],
        force: bool = False,
    ) -> bool:
        """Saves a step if it is due, after waiting for the save before it.

        The arrays may be donated or deleted once this returns. A step of the same number that `restore` found
        damaged is replaced; other steps that it found damaged are deleted once this one is written.

        Args:
            step: the number to save under, not negative.
            state: a tree of jax arrays; PRNG key arrays are allowed.
            data: the position in the data; JSON.
            config: the configuration of the run; JSON.
            force: save also when `should_save` says no. A step that is there already is not saved again.

        Returns:
            Whether a save was started.

        Raises:
            TypeError: a leaf of `state` is not a jax array, or `data` or `config` is not JSON.
            ValueError: a leaf of `state` has no elements.
            CheckpointError: the save before this one failed, or this one before it went to the background; or the
                directory holds this or a later step that this run did not restore: it belongs to another run.
        """
        if not force and not self.should_save(step):
            return False
        self.wait()
        if step in self._good:
            return False
        leaves.check_storable(state)
        args = import_orbax().args
        items = args.Composite(
            state=args.PyTreeSave(state),
            data=args.JsonSave(_json_copy("data", data)),
            config=args.JsonSave(_json_copy("config", config)),
            leaves=args.JsonSave(leaves.describe(state)),
        )
        if self._writer:
            self._make_room(step)
        try:
            with jax.transfer_guard("allow"):
                self._checkpointer.save(self._path(step), args=items)
        except Exception as error:
            self._fail(step, error)
            self.wait()
        self._thread = threading.Thread(target=self._finish, args=(step,), name=f"checkpoint-{step}")
        self._thread.start()
        if not self._async:
            self.wait()
        return True

    def restore(self, abstract_state: Any, step: int | None = None) -> Restored | None:
        """Restores the newest step whose files are all as written, bit for bit.

        Damaged steps are passed over, each with one line on stderr that names it and what is wrong.

        Args:
            abstract_state: a tree of `jax.ShapeDtypeStruct` or arrays; their `sharding` says where to place the
                values (the default device where there is none).
            step: restore this one and no other.

        Returns:
            None if `step` is None and the directory holds no steps.

        Raises:
            ValueError: the checkpoint is intact but of another model or optimizer; lists the paths that differ.
            CheckpointError: there are steps, but none is good; or `step` is missing or damaged.
        """
        self.wait()
        if jax.process_count() == 1:
            found = self._newest_good(lambda number: self._read(number, abstract_state), step)
        else:
            # Restoring has barriers, so all processes must know of a good step before any of them begins.
            step = self._agree_on_step(step)
            found = None if step is None else (step, self._read(step, abstract_state))
        if found is None:
            return None
        self._good.add(found[0])
        return found[1]

    def wait(self) -> None:
        """Blocks until the save in progress, if any, is written, digests included.

        Raises:
            CheckpointError: the save failed; its cause is chained. What it wrote was removed; saving can go on.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            (step, cause), self._failure = self._failure, None
            raise CheckpointError(
                f"saving step {step} to {self._directory} failed: {type(cause).__name__}: {cause}"
            ) from cause

    def close(self) -> None:
        """Waits as `wait` does and ends Orbax's threads; nothing can be saved after it."""
        try:
            self.wait()
        finally:
            self._checkpointer.close()

    def _path(self, step: int) -> epath.Path:
        return self._directory / str(step)

    def _prepare_directory(self) -> bool:
        """Creates and clears the directory; returns whether a folder can be renamed there, to commit a step.

        Object stores have no rename; there, and where it fails, a marker file in the folder commits a step.
        """
        outcome, failure = _CANNOT_WRITE, None
        if self._writer:
            try:
                self._directory.mkdir(parents=True, exist_ok=True)
                outcome = _RENAME_COMMITS if can_rename(self._directory) else _MARKER_COMMITS
                self._remove_unfinished(outcome == _RENAME_COMMITS)
            except OSError as error:
                outcome, failure = _CANNOT_WRITE, error
        outcome = _from_process_0(outcome)
        if outcome == _CANNOT_WRITE:
            raise CheckpointError(
                f"cannot write checkpoints to {self._directory}: {failure or 'process 0 failed'}; "
                f"choose a directory that this user can write"
            ) from failure
        return outcome == _RENAME_COMMITS

    def _remove_unfinished(self, renames: bool) -> None:
        for child in self._directory.iterdir():
            number, _, suffix = child.name.partition(".")
            temporary = f".{suffix}".startswith(TEMPORARY)
            if not suffix and not renames:
                temporary = not any((child / name).exists() for name in (COMMIT_MARKER, DIGESTS))
            if number.isdecimal() and temporary:
                child.rmtree()

    def _make_room(self, step: int) -> None:
        try:
            present = [number for number in list_steps(self._directory) if number >= step]
            if not (strangers := set(present) - self._bad - self._good):
                if step in present:
                    self._delete_damaged(step)
                return
        except OSError as error:
            raise CheckpointError(f"saving step {step} to {self._directory} failed: {error}") from error
        raise CheckpointError(
            f"cannot save step {step}: {self._directory} holds step {max(strangers)}, which this run did not "
            f"restore; restore it first or use another directory"
        )

    def _delete_damaged(self, step: int) -> None:
        report(f"checkpoint deleted in {self._directory}: step {step}, damaged")
        self._path(step).rmtree()

    def _finish(self, step: int) -> None:
        """Runs in the thread of a save: waits for Orbax's commit, makes the step trusted, then tidies up."""
        try:
            self._checkpointer.wait_until_finished()
            if self._writer:
                write_digests(self._path(step))
            self._bad.discard(step)
            self._good.add(step)
            if self._writer:
                self._delete_old()
        except BaseException as error:
            self._fail(step, error)

    def _delete_old(self) -> None:
        steps = list_steps(self._directory)
        for step in steps:
            if step in self._bad:
                self._delete_damaged(step)
        for step in [step for step in steps if step not in self._bad][: -self._keep]:
            self._path(step).rmtree()

    def _fail(self, step: int, error: BaseException) -> None:
        """Keeps the error for `wait` and removes what the save wrote: a full disk needs the room."""
        self._failure = (step, error)
        if step in self._good:
            return
        self._bad.add(step)
        if self._writer:
            try:
                self._remove_unfinished(self._renames)
                if self._path(step).exists():
                    self._path(step).rmtree()
            except OSError:
                pass  # What remains has no digests: it is not trusted, and the next start removes it.

    def _newest_good(self, read: Callable[[int], Any], step: int | None) -> tuple[int, Any] | None:
        def attempt(number: int) -> Any:
            try:
                return verified(self._path(number), lambda: read(number))
            except DamagedStep:
                self._bad.add(number)
                raise

        return newest_good(self._directory, attempt, step)

    def _agree_on_step(self, step: int | None) -> int | None:
        chosen, failure = _NO_STEP, None
        if self._writer:
            try:
                found = self._newest_good(lambda number: None, step)
                chosen = _NO_STEP if found is None else found[0]
            except CheckpointError as error:
                chosen, failure = _NO_GOOD_STEP, error
        chosen = _from_process_0(chosen)
        if chosen == _NO_GOOD_STEP:
            raise failure or CheckpointError(f"process 0 found no good checkpoint in {self._directory}")
        return None if chosen == _NO_STEP else chosen

    def _read(self, step: int, abstract_state: Any) -> Restored:
        path = self._path(step)
        abstract_state = leaves.abstract(abstract_state)
        # Orbax would convert another dtype without a word, and name one differing leaf of many.
        if differences := leaves.differences(read_json(path / "leaves"), leaves.describe(abstract_state)):
            raise ValueError(
                f"the checkpoint {path} is of another model or optimizer: {differences}. Restore it with the "
                f"configuration that it was saved with, or use another directory."
            )
        ocp = import_orbax()
        items = ocp.args.Composite(
            state=ocp.args.PyTreeRestore(
                # All leaves are there; a part that has none, such as `task`, an older checkpoint may lack.
                *(abstract_state, ocp.checkpoint_utils.construct_restore_args(abstract_state)),
                partial_restore=True,
            ),
            data=ocp.args.JsonRestore(),
            config=ocp.args.JsonRestore(),
        )
        with jax.transfer_guard("allow"):
            restored = self._handler.restore(path, args=items)
        return Restored(step, restored.state, restored.data, restored.config)


def _from_process_0(value: int) -> int:
    """Returns process 0's `value` in every process."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def _json_copy(name: str, value: Mapping[str, Any]) -> dict[str, Any]:
    """Copies, so that the caller may go on to change `value` while it is written."""
    try:
        return json.loads(json.dumps(dict(value)))
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be a mapping that JSON can hold: {error}") from error
