"""What data sets of every kind share: a fingerprint of their content, errors about splits and paths."""

import hashlib
from collections.abc import Sequence

from etils import epath


def fingerprint(head: str, *content: bytes | str) -> str:
    """`head` and a digest of the parts, in which no two lists of parts look alike."""
    digest = hashlib.sha256()
    for part in content:
        part = part.encode() if isinstance(part, str) else part
        digest.update(len(part).to_bytes(8, "little") + part)
    return f"{head}:{digest.hexdigest()[:16]}"


def unknown_split(split: str, known: Sequence[str], where: str) -> ValueError:
    """The error for a split that `where` does not have."""
    return ValueError(f"unknown split {split!r} of {where}, which has {', '.join(known) or 'none'}")


def required_path(path: epath.PathLike | None, name: str, meaning: str) -> epath.Path:
    """The path of a data set that cannot do without one."""
    if path is None:
        raise ValueError(f"data set {name!r} needs a path: {meaning}")
    return epath.Path(path).expanduser()
