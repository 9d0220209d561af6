"""What `gs://` can do, in a local folder: whole objects only, no appending and no renaming."""

import contextlib
import pathlib

from etils.epath import backend, gpath
from orbax.checkpoint._src.serialization import tensorstore_utils

# A scheme that etils knows and for which Orbax takes a plain file, not a service.
SCHEME = "hf"
PREFIX = f"{SCHEME}://"


class ObjectStore(type(backend.os_backend)):
    """A backend of `epath`; `renames` and `appends` count what was tried and refused."""

    def __init__(self, root: pathlib.Path):
        self.root, self.writes = root, 0

    def local(self, path) -> str:
        return str(self.root / str(path).removeprefix(PREFIX))

    def open(self, path, mode):
        assert "a" not in mode and "+" not in mode, "an object store cannot append"
        self.writes += "w" in mode
        local = pathlib.Path(self.local(path))
        if "w" in mode:
            # There are no folders there: a name may hold slashes.
            local.parent.mkdir(parents=True, exist_ok=True)
        return super().open(str(local), mode)

    def exists(self, path):
        return super().exists(self.local(path))

    def isdir(self, path):
        return super().isdir(self.local(path))

    def makedirs(self, path, *, exist_ok=False, mode=None):
        super().makedirs(self.local(path), exist_ok=exist_ok, mode=mode)

    def mkdir(self, path, *, exist_ok=False, mode=None):
        with contextlib.suppress(FileExistsError):
            super().mkdir(self.local(path), exist_ok=exist_ok, mode=mode)

    def listdir(self, path):
        return super().listdir(self.local(path))

    def glob(self, path):
        return [found.replace(f"{self.root}/", PREFIX) for found in super().glob(self.local(path))]

    def rmtree(self, path):
        super().rmtree(self.local(path))

    def remove(self, path):
        super().remove(self.local(path))

    def copy(self, path, dst, overwrite):
        super().copy(self.local(path), self.local(dst), overwrite)

    def stat(self, path):
        return super().stat(self.local(path))

    def rename(self, path, dst):
        raise OSError(f"an object store cannot rename {path} to {dst}")

    replace = rename


def install(monkeypatch, root: pathlib.Path) -> ObjectStore:
    """Makes `PREFIX` the addresses of a store in a local folder."""
    store = ObjectStore(root)
    monkeypatch.setitem(gpath._PREFIX_TO_BACKEND, SCHEME, store)
    monkeypatch.setattr(gpath, "_is_tf_installed", lambda: False)
    build = tensorstore_utils.build_kvstore_tspec
    monkeypatch.setattr(
        tensorstore_utils,
        "build_kvstore_tspec",
        lambda directory, *args, **options: build(
            store.local(directory) if str(directory).startswith(PREFIX) else directory, *args, **options
        ),
    )
    return store
