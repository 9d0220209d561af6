"""Weight files: every format read right, damage always told, nothing ever executed."""

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import types
import zipfile

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from tests.data.make_torch_fixtures import DIRECTORY, expected
from zoo.errors import WeightsError
from zoo.formats.readers import open_source, read_weights
from zoo.formats.writers import write_weights

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
ARRAYS = {
    "a.weight": np.sin(np.arange(12, dtype=np.float32)).reshape(3, 4),
    "a.bias": np.arange(3, dtype=np.float16),
    "b/kernel": np.cos(np.arange(5)),
    "b/scale": np.array([1.5, -2.0, 3.25], np.float32).astype(BFLOAT16),
    "count": np.array(7, np.int64),
    "flags": np.array([True, False]),
    "none": np.zeros((0, 2), np.float32),
}


def assert_same(actual, wanted):
    assert set(actual) == set(wanted)
    for name, array in wanted.items():
        assert actual[name].dtype == array.dtype and actual[name].shape == array.shape, name
        assert actual[name].tobytes() == array.tobytes(), name


def write(path, arrays):
    # A loop variable that the function would look up when it is called.
    write_weights(path, {k: (v.shape, v.dtype, lambda v=v: v) for k, v in arrays.items()})


@pytest.mark.parametrize("name", ("zip", "legacy"))
def test_torch_files(name):
    source = open_source(DIRECTORY / f"{name}.pth")
    assert_same({k: np.ascontiguousarray(v) for k, v in source.arrays.items()} | scalars(source), expected())
    assert source.format == {"zip": "torch", "legacy": "torch (legacy)"}[name]
    assert source.unwrapped == ("state_dict",) and source.beside == ("args", "best", "epoch", "optimizer")
    code = f"import sys; from zoo.formats.readers import open_source; open_source({str(DIRECTORY / name)!r} + '.pth')"
    subprocess.run([sys.executable, "-c", f"{code}; sys.exit('torch' in sys.modules)"], check=True)


def scalars(source):
    # ascontiguousarray gives scalars an axis.
    return {k: v for k, v in source.arrays.items() if v.ndim == 0}


@pytest.mark.parametrize("suffix", ("safetensors", "npz"))
def test_write_and_read(tmp_path, suffix):
    path = tmp_path / f"weights.{suffix}"
    write(path, ARRAYS)
    assert_same(read_weights(path), ARRAYS)
    assert open_source(path).format == suffix
    assert os.listdir(tmp_path) == [path.name]


def test_safetensors_agree_with_the_library(tmp_path):
    plain = {k: v for k, v in ARRAYS.items() if v.dtype != BFLOAT16}
    write(tmp_path / "ours.safetensors", plain)
    assert_same(safetensors.numpy.load_file(tmp_path / "ours.safetensors"), plain)
    safetensors.numpy.save_file(plain, tmp_path / "theirs.safetensors", metadata={"by": "them"})
    assert_same(read_weights(tmp_path / "theirs.safetensors"), plain)


def test_bfloat16_safetensors_from_raw_bytes(tmp_path):
    header = json.dumps({"x": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}).encode()
    # 1.0 and -2.5 in bfloat16 are the upper halves of their float32 bit patterns.
    data = struct.pack("<HH", 0x3F80, 0xC020)
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + data)
    x = read_weights(tmp_path / "x.safetensors")["x"]
    assert x.dtype == BFLOAT16
    np.testing.assert_array_equal(x.astype(np.float32), [1.0, -2.5])


@pytest.mark.parametrize("save", (np.savez, np.savez_compressed))
def test_npz_agrees_with_numpy(tmp_path, save):
    fortran = np.asfortranarray(np.arange(6.0).reshape(2, 3))
    plain = {k: v for k, v in ARRAYS.items() if v.dtype != BFLOAT16}
    save(tmp_path / "theirs.npz", fortran=fortran, **plain)
    found = read_weights(tmp_path / "theirs.npz")
    np.testing.assert_array_equal(found.pop("fortran"), fortran)
    assert_same(found, plain)
    write(tmp_path / "ours.npz", plain)
    with np.load(tmp_path / "ours.npz") as loaded:
        assert_same(dict(loaded), plain)


def test_files_are_mapped_not_copied(tmp_path):
    for path in (DIRECTORY / "zip.pth", DIRECTORY / "legacy.pth"):
        assert not read_weights(path)["float"].flags.owndata
    for name in ("w.safetensors", "w.npz"):
        write(tmp_path / name, ARRAYS)
        array = read_weights(tmp_path / name)["a.weight"]
        assert not array.flags.owndata and not array.flags.writeable


class FakeTorch:
    """What this package may assume of a torch tensor."""

    def __init__(self, array):
        self.array, self.dtype = array, f"torch.{array.dtype}"

    def detach(self):
        return self

    cpu = detach

    def numpy(self):
        return self.array


def test_mappings_of_other_frameworks():
    wanted = {k: v for k, v in ARRAYS.items() if v.dtype.kind == "f" and v.dtype.itemsize <= 4}
    assert_same(read_weights({k: jnp.asarray(v) for k, v in wanted.items()}), wanted)
    assert_same(read_weights({k: FakeTorch(v) for k, v in wanted.items()}), wanted)
    bfloat16 = {"x": ARRAYS["b/scale"]}
    assert_same(read_weights({"x": jnp.asarray(bfloat16["x"])}), bfloat16)
    assert_same(read_weights({"net/w:0": wanted["a.weight"]}), {"net/w": wanted["a.weight"]})
    nested = {"params": {"a": {"kernel": wanted["a.weight"]}}}
    assert_same(read_weights(nested), {"params/a/kernel": wanted["a.weight"]})


class FakeBfloat16(FakeTorch):
    """A torch tensor whose dtype `numpy()` refuses."""

    def contiguous(self):
        return self

    def view(self, dtype):
        return FakeTorch(self.array.view(dtype))

    def numpy(self):
        raise TypeError("Got unsupported ScalarType BFloat16")


def test_bfloat16_torch_tensors(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(int16=np.int16))
    assert_same(read_weights({"x": FakeBfloat16(ARRAYS["b/scale"])}), {"x": ARRAYS["b/scale"]})


def test_wrappers_and_averages():
    raw, ema = {"w": np.ones(2, np.float32)}, {"w": np.full(2, 3, np.float32)}
    both = {"model": {"module.w": raw["w"]}, "model_ema": ema, "epoch": 4}
    averaged = open_source(both)
    assert averaged.weights == "ema" and averaged.unwrapped == ("model_ema",) and averaged.beside == ("epoch",)
    assert_same(averaged.arrays, ema)
    assert_same(open_source(both, default="raw").arrays, raw)
    assert_same(open_source(both, "ema", default="raw").arrays, ema)
    assert_same(open_source({"model_ema": ema}, default="raw").arrays, ema)
    trained = open_source(both, "raw")
    assert trained.weights == "raw" and trained.unwrapped == ("model", "module.")
    assert_same(trained.arrays, raw)
    assert open_source({"state_dict": raw}).weights is None
    with pytest.raises(WeightsError, match="averaged weights .* only"):
        open_source({"model_ema": ema}, "raw")
    with pytest.raises(ValueError, match="weights must be 'ema', 'raw' or None, got 'best'"):
        open_source(both, "best")
    # One name with a mistake in it does not hide that the others are wrapped.
    source = open_source({"module.a": raw["w"], "module.b": raw["w"], "mdule.c": raw["w"]})
    assert set(source.arrays) == {"a", "b", "mdule.c"}


def test_mappings_that_are_none():
    with pytest.raises(WeightsError, match="'arch' is a str, not an array of numbers"):
        read_weights({"w": np.ones(2), "arch": "davit"})
    with pytest.raises(WeightsError, match="'w' is a list"):
        read_weights({"w": [np.ones(2), np.ones(3)]})
    with pytest.raises(WeightsError, match="no tensors"):
        read_weights({})
    with pytest.raises(TypeError, match="source must be a path or a mapping of arrays, got int"):
        read_weights(3)


@pytest.fixture(params=("zip.pth", "legacy.pth", "weights.safetensors", "weights.npz"))
def complete(request, tmp_path):
    """A complete file of each format."""
    if request.param.startswith("weights"):
        write(tmp_path / request.param, ARRAYS)
        return tmp_path / request.param
    return DIRECTORY / request.param


def test_truncation(complete, tmp_path):
    data = complete.read_bytes()
    cut = tmp_path / f"cut{complete.suffix}"
    for size in (*range(30), *range(30, len(data), 13), *range(len(data) - 30, len(data))):
        cut.write_bytes(data[:size])
        # Up to the first bytes there is nothing to tell a format by but the suffix, which torch files share.
        kinds = "truncated at byte|not a weight file" if size < 4 else f"truncated at byte {size}"
        with pytest.raises(WeightsError, match=kinds):
            read_weights(cut)


def test_flipped_bits_never_surprise(complete, tmp_path):
    """Any single damaged byte gives arrays or a WeightsError, and a torch or npz file with checksums an error."""
    data = complete.read_bytes()
    flipped = tmp_path / f"flipped{complete.suffix}"
    generator = np.random.default_rng(0)
    for position in generator.permutation(len(data))[:250]:
        damaged = bytearray(data)
        damaged[position] ^= 1 << int(generator.integers(8))
        flipped.write_bytes(damaged)
        try:
            found = read_weights(flipped)
        except WeightsError:
            continue
        assert all(isinstance(array, np.ndarray) for array in found.values())
        if complete.name in ("zip.pth", "weights.npz"):
            wanted = expected() if complete.name == "zip.pth" else ARRAYS
            for name in set(found) & set(wanted):
                np.testing.assert_array_equal(found[name], wanted[name])


def test_files_that_are_no_weights(tmp_path):
    path = tmp_path / "weights.pth"
    with pytest.raises(WeightsError, match="no such file"):
        read_weights(path)
    path.write_bytes(b"")
    with pytest.raises(WeightsError, match="truncated at byte 0: the file is empty"):
        read_weights(path)
    path.write_bytes(b"<html>404 Not Found</html>")
    with pytest.raises(WeightsError, match=r"begins with b'<html>40'; safetensors, npz, torch"):
        read_weights(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(WeightsError, match="neither numpy arrays .* nor torch"):
        read_weights(path)
    np.savez(tmp_path / "objects.npz", x=np.array([{}, None]))
    with pytest.raises(WeightsError, match="refused 'x': it holds Python objects"):
        read_weights(tmp_path / "objects.npz")
    path.write_bytes(pickle.dumps({"w": 1.0}))
    with pytest.raises(WeightsError, match="not one of torch.save"):
        read_weights(path)
    with pytest.raises(WeightsError, match=r"no checkpoints in .*expected folders named by their step"):
        read_weights(tmp_path)


def test_safetensors_with_bytes_left_over(tmp_path):
    path = tmp_path / "weights.safetensors"
    write(path, ARRAYS)
    path.write_bytes(path.read_bytes() + b"more")
    with pytest.raises(WeightsError, match="damaged: 4 bytes follow the last tensor"):
        read_weights(path)


class Touch:
    """Unpickled the ordinary way, it runs a command."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def as_zip(payload: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", payload)
        archive.writestr("archive/version", "3\n")
    return file.getvalue()


def as_legacy(payload: bytes) -> bytes:
    system = {"protocol_version": 1001, "little_endian": True}
    return b"".join(pickle.dumps(x, 2) for x in (0x1950A86A20F9469CFC6C, 1001, system)) + payload + pickle.dumps([], 2)


@pytest.mark.parametrize("wrap", (as_zip, as_legacy))
@pytest.mark.parametrize("protocol", (0, 1, 2, 4))
def test_malicious_pickles_do_not_run(tmp_path, wrap, protocol):
    marker, path = tmp_path / "marker", tmp_path / "weights.pth"
    payload = pickle.dumps({"state_dict": {}, "args": Touch(marker)}, protocol)
    path.write_bytes(wrap(payload))
    with pytest.raises(WeightsError, match=r"refused to build '(posix|nt)\.system'.*save its state_dict\(\) alone"):
        read_weights(path)
    assert not marker.exists()
    pickle.loads(payload)
    assert marker.exists(), "the payload is harmless, so that the test shows nothing"


# Pickles written by hand that want code executed or data damaged: (name, opcodes, the error).
TRICKS = (
    ("eval", b"cbuiltins\neval\n(V1+1\ntR.", "refused to build 'builtins.eval'"),
    ("text string", b"S'x'\n.", "refused pickle opcode STRING"),
    ("import by stack", b"\x8c\x08builtins\x8c\x04exec\x93(V1\ntR.", "refused to build 'builtins.exec'"),
    ("old instance", b"(V1\nios\nsystem\n.", "refused pickle opcode INST"),
    ("object", b"(cos\nsystem\nV1\no.", "refused to build 'os.system'"),
    ("attribute of a known module", b"ctorch._utils\n_import_dotted_name\n.", "refused to build 'torch._utils._imp"),
    ("state of a function", b"ccollections\nOrderedDict\n}(V__code__\nI1\nub.", "refused to set the state"),
    ("state of a list", b"]}(Vx\nI1\nub.", "refused to set the state of a list"),
    ("dtype as a function", b"ctorch\nfloat32\n(tR.", "called, which is not a function"),
    ("object array", b"cnumpy\ndtype\n(VO8\ntR.", "refused a numpy array of dtype 'O8'"),
    ("foreign storage", b"(Vmodule\nVx\nVy\nVz\nI1\ntQ.", "only tensor storages are read"),
    ("persistent text", b"Pstorage\n.", "refused pickle opcode PERSID"),
    ("extension", b"\x82\x01.", "refused pickle opcode EXT1"),
    ("itself", b"]q\x00h\x00a.", "contains itself"),
    ("huge", b"(Vstorage\nctorch\nFloatStorage\nVk\nVcpu\nI999999999999\ntQ.", "not a dict of|storages .* missing"),
)


@pytest.mark.parametrize("trick", TRICKS, ids=lambda trick: trick[0].replace(" ", "-"))
@pytest.mark.parametrize("wrap", (as_zip, as_legacy))
def test_tricks(tmp_path, wrap, trick):
    _, payload, message = trick
    (tmp_path / "weights.pth").write_bytes(wrap(payload))
    with pytest.raises(WeightsError, match=message):
        read_weights(tmp_path / "weights.pth")


def test_whole_modules_are_refused():
    with pytest.raises(WeightsError, match=r"whole_module.pth: refused to build 'torch.nn.modules.linear.Linear'"):
        read_weights(DIRECTORY / "whole_module.pth")


def test_failed_writing_leaves_nothing(tmp_path):
    path = tmp_path / "weights.safetensors"
    write(path, {"old": np.ones(2)})

    def fail():
        raise KeyboardInterrupt

    arrays = {"a": ((2,), np.dtype(np.float32), lambda: np.ones(2, np.float32)), "b": ((2,), np.dtype(float), fail)}
    with pytest.raises(KeyboardInterrupt):
        write_weights(path, arrays)
    assert os.listdir(tmp_path) == [path.name]
    assert set(read_weights(path)) == {"old"}
    with pytest.raises(ValueError, match="path must end in .safetensors, .npz, .pth or .pt, got .*weights.h5"):
        write(tmp_path / "weights.h5", ARRAYS)
    with pytest.raises(FileNotFoundError, match="cannot create a file here.*nowhere"):
        write(tmp_path / "nowhere" / "w.npz", ARRAYS)
    with pytest.raises(ValueError, match="safetensors has no dtype complex128"):
        write(path, {"x": np.ones(2, complex)})
