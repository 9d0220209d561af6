"""TFDS data sets that lie prepared on a disk, read without TensorFlow and never downloaded."""

import dataclasses
import json
import shlex
from collections.abc import Sequence
from typing import Any

from etils import epath

from train import splits


@dataclasses.dataclass(frozen=True)
class Prepared:
    """One split of a prepared TFDS data set.

    Attributes:
        name: what error messages call the data set, without the split.
        info: TFDS's description, `tfds.core.DatasetInfo`.
        split: as TFDS writes it, such as "train[:90%]".
        records: random access to the serialised examples.
    """

    name: str
    info: Any
    split: str
    records: Sequence[bytes]

    def fingerprint(self, *content: str) -> str:
        """Tells from the metadata, and from what else is given, whether two splits are the same."""
        return splits.fingerprint(
            f"tfds:{self.info.full_name}:{self.split}:{len(self.records)} examples",
            *sorted(self.info.features),
            *content,
            *(f"{known} {each.num_bytes} {each.shard_lengths}" for known, each in self.info.splits.items()),
        )


def open_prepared(name: str, *, split: str, path: epath.PathLike | None) -> Prepared:
    """Opens one split of a prepared TFDS data set.

    Args:
        name: "tfds" for the version directory `path`, or "tfds:NAME[/CONFIG][:VERSION]" for a data set found by name
            in the TFDS data directory `path`; None means $TFDS_DATA_DIR or else ~/tensorflow_datasets.
        split: a TFDS split.
        path: see `name`.

    Raises:
        ValueError: an unknown or empty split, a missing path.
        FileNotFoundError: nothing is there; the error says how to prepare it.
        NotImplementedError: another format than ArrayRecord; the error says how to convert it.
    """
    import tensorflow_datasets as tfds

    if name == "tfds":
        meaning = "the version directory of a prepared data set, such as .../mnist/3.0.1"
        builder = _builder_from_directory(splits.required_path(path, name, meaning))
    else:
        builder = _builder_by_name(name.removeprefix("tfds:"), path)
    info = builder.info
    name = f"TFDS data set {info.full_name}"
    if tfds.core.FileFormat.ARRAY_RECORD not in info.available_file_formats():
        # Only the conversion in place, with one worker, writes the metadata too (seen with TFDS 4.9.10).
        command = (
            f"tfds convert_format --dataset_version_dir={shlex.quote(str(builder.data_dir))} "
            "--out_file_format=array_record --num_workers=1"
        )
        raise NotImplementedError(
            f"the {name} is stored as {info.file_format.value}, which has no random access. To add ArrayRecord "
            "files beside those, in an environment of its own, since reading them needs TensorFlow:\n"
            "  pip install tensorflow tensorflow-datasets array_record apache-beam mlcroissant\n"
            f"  {command}"
        )
    try:
        part = info.splits[split]
    except (KeyError, ValueError) as error:
        raise splits.unknown_split(split, list(info.splits), f"the {name}") from error
    if not part.num_examples:
        raise ValueError(f"split {split!r} of the {name} has no example")
    records = builder.as_data_source(
        split,
        deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES,
        file_format=tfds.core.FileFormat.ARRAY_RECORD,
    )
    return Prepared(name, info, split, records)


def _builder_from_directory(directory: epath.Path) -> Any:
    import tensorflow_datasets as tfds

    if not (directory / "dataset_info.json").exists():
        below = [info for depth in range(1, 4) for info in directory.glob("*/" * depth + "dataset_info.json")]
        hint = f"; did you mean {str(below[-1].parent)!r}?" if below else ", nor has any directory in it"
        raise FileNotFoundError(
            f"data path {str(directory)!r} is not a prepared TFDS data set: it has no dataset_info.json{hint}"
        )
    return tfds.builder_from_directory(directory)


def _builder_by_name(name: str, path: epath.PathLike | None) -> Any:
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import read_only_builder

    data_dir = None if path is None else str(epath.Path(path).expanduser())
    try:
        return read_only_builder.builder_from_files(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError as error:
        where = repr(data_dir) if data_dir else "$TFDS_DATA_DIR (or else ~/tensorflow_datasets)"
        argument = f", data_dir={json.dumps(data_dir)}" if data_dir else ""
        script = (
            "import tensorflow_datasets as tfds; "
            f'tfds.builder("{name}"{argument}, file_format="array_record").download_and_prepare()'
        )
        raise FileNotFoundError(
            f"the TFDS data set {name!r} is not prepared in {where}, and nothing is downloaded unasked. To prepare "
            "it, in an environment of its own, since writing TFDS files needs TensorFlow:\n"
            "  pip install tensorflow tensorflow-datasets array_record importlib_resources\n"
            f"  python -c {shlex.quote(script)}"
        ) from error
