"""Every format into every other and back: the same bits, under the names that were asked for, or nothing at all."""

import io
import itertools
import json
import pickle
import zipfile

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import zoo
from tests.tf_checkpoints import write_checkpoint
from tests.toy_family import (
    DIM,
    tensorflow_arrays,
    torch_arrays,
    wanted_leaves,
)
from train.checkpoint import Checkpoints
from zoo.formats.readers import read_weights
from zoo.formats.torch_writer import write_torch
from zoo.formats.writers import write_weights
from zoo.keymap import unflatten

pytestmark = pytest.mark.usefixtures("toy")

ENDINGS = (".safetensors", ".npz", ".pth", "")


def mixed():
    """A checkpoint with a dtype per tensor, which no two of them lose."""
    dtypes = itertools.cycle((np.float32, ml_dtypes.bfloat16, np.float16))
    return {name: array.astype(dtype) for (name, array), dtype in zip(torch_arrays().items(), dtypes)}


def same(found, wanted):
    assert set(found) == set(wanted)
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape, name
        assert found[name].tobytes() == np.ascontiguousarray(array).tobytes(), name


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The mixed checkpoint in every format, in torch's names but for the directory; made without `convert`."""
    root = tmp_path_factory.mktemp("sources")
    arrays = mixed()
    np.savez(root / "a.npz", **arrays)
    for ending in (".safetensors", ".pth"):
        write_weights(root / f"a{ending}", {k: (v.shape, v.dtype, lambda v=v: v) for k, v in arrays.items()})
    tree = unflatten(jax.tree.map(jax.numpy.asarray, wanted_leaves(torch_arrays())))
    state = {"params": tree["params"], "model_state": {"batch_stats": tree["batch_stats"]}, "ema": {}}
    with Checkpoints(root / "a", every_steps=1, keep=1) as checkpoints:
        checkpoints.save(3, state, data={}, config={})
    return root


@pytest.mark.parametrize("before, after", list(itertools.product(ENDINGS, ENDINGS)))
def test_there_and_back(sources, tmp_path, before, after):
    there, back = tmp_path / f"there{after}", tmp_path / f"back{before}"
    report = zoo.convert("toy_tiny", sources / f"a{before}", there)
    assert report.naming == ("zoo" if after == "" else "torch") and not report.resized
    zoo.convert("toy_tiny", there, back, naming="torch" if before else None)
    wanted = mixed() if before else wanted_leaves(torch_arrays())
    found = read_weights(back)
    same(found, wanted)
    if after:
        same(read_weights(there), torch_arrays() if not before else mixed())


def test_names(tmp_path):
    arrays = torch_arrays()
    source = tmp_path / "a.npz"
    np.savez(source, **arrays, **{"stem.bn.num_batches_tracked": np.array(4)})
    wanted = {"tensorflow": tensorflow_arrays(arrays), "torch": arrays, "zoo": wanted_leaves(arrays)}
    for naming, tensors in wanted.items():
        path = tmp_path / f"{naming}.safetensors"
        report = zoo.convert("toy_tiny", source, path, naming=naming)
        same(safetensors.numpy.load_file(path), tensors)
        # What is not asked for stays: here the source's names.
        zoo.convert("toy_tiny", path, tmp_path / f"{naming}.npz")
        same(read_weights(tmp_path / f"{naming}.npz"), tensors)
    assert report.source.ignored == {"a counter of training steps": ("stem.bn.num_batches_tracked",)}
    text = str(report)
    assert text.endswith(f"{tmp_path}/zoo.safetensors: safetensors, names as in zoo; every value as in the source")
    assert json.loads(report.to_json())["source"]["naming"] == "torch"
    body = {f"tower.{k}": v for k, v in arrays.items() if "head" not in k}
    zoo.convert("toy_tiny", body, tmp_path / "tower.npz")
    same(read_weights(tmp_path / "tower.npz"), body)


def test_dtypes(tmp_path):
    arrays = torch_arrays()
    for ending, dtype in ((".safetensors", "bfloat16"), (".pth", "float16"), ("", "bfloat16")):
        naming = "torch" if ending else None
        zoo.convert("toy_tiny", arrays, tmp_path / f"a{ending}", dtype=dtype, naming=naming)
        wanted = arrays if ending else wanted_leaves(arrays)
        same(read_weights(tmp_path / f"a{ending}"), {k: v.astype(jax.numpy.dtype(dtype)) for k, v in wanted.items()})
    # Doubles stay doubles, although the model computes in single precision.
    doubles = {k: v.astype(np.float64) + 1e-12 for k, v in arrays.items()}
    for naming in ("torch", "zoo"):
        zoo.convert("toy_tiny", doubles, tmp_path / f"{naming}.npz", naming=naming)
        zoo.convert("toy_tiny", tmp_path / f"{naming}.npz", tmp_path / "back.npz", naming="torch", overwrite=True)
        same(read_weights(tmp_path / "back.npz"), doubles)


def test_averages(tmp_path):
    raw, average = torch_arrays(), {k: v + 1 for k, v in torch_arrays().items()}
    both = {"state_dict": raw, "state_dict_ema": average}
    for weights, wanted in ((None, average), ("ema", average), ("raw", raw)):
        zoo.convert("toy_tiny", both, tmp_path / "a.pth", weights=weights, overwrite=True)
        same(read_weights(tmp_path / "a.pth"), wanted)
    suffixed = tensorflow_arrays(raw)
    names = [k for k in suffixed if "moving" not in k]
    suffixed |= {f"{k}/ExponentialMovingAverage": tensorflow_arrays(average)[k] for k in names}
    zoo.convert("toy_tiny", suffixed, tmp_path / "b.npz")
    wanted = tensorflow_arrays(average)
    same(read_weights(tmp_path / "b.npz"), {k: wanted[k] if k in names else suffixed[k] for k in wanted})


def test_tensorflow(tmp_path):
    """A checkpoint of TensorFlow's, averages and all, into a file of torch's names, with nothing rounded."""
    raw, average = torch_arrays(), {k: v + 1 for k, v in torch_arrays().items()}
    shadows = {k: v for k, v in tensorflow_arrays(average).items() if "/moving_" not in k}
    arrays = tensorflow_arrays(raw) | {f"{k}/ExponentialMovingAverage": v for k, v in shadows.items()}
    write_checkpoint(tmp_path / "model.ckpt-5", arrays | {"global_step": np.array(5, np.int64)})
    report = zoo.convert("toy_tiny", tmp_path / "model.ckpt-5", tmp_path / "a.pth", naming="torch")
    assert (report.source.format, report.source.weights) == ("tensorflow", "ema")
    same(read_weights(tmp_path / "a.pth"), average | {k: v for k, v in raw.items() if "running" in k})


def test_tables_of_another_size(tmp_path):
    """Under its own names a table stays as it is; other names are those of a model whose table has its size."""
    arrays = torch_arrays(span=9)
    zoo.convert("toy_tiny", arrays, tmp_path / "a.npz")
    same(read_weights(tmp_path / "a.npz"), arrays)
    report = zoo.convert("toy_tiny", arrays, tmp_path / "b.npz", naming="tensorflow")
    found = read_weights(tmp_path / "b.npz")["toy/block_00/relative_bias"]
    resized = np.asarray(jax.image.resize(arrays["blocks.0.table"], (2, 5, 5), "bilinear"))
    np.testing.assert_array_equal(found, resized)
    assert "2 resized: (2, 9, 9) -> (2, 5, 5), bilinear" in str(report) and len(report.resized) == 2
    assert not zoo.convert("toy_tiny", arrays, tmp_path / "c.npz", naming="zoo", image_size=20).resized


def test_a_directory_is_one_of_the_train_loops(tmp_path):
    arrays = torch_arrays()
    zoo.convert("toy_tiny", arrays, tmp_path / "run")
    model, variables, report = zoo.load_pretrained("toy_tiny", tmp_path / "run")
    assert report.format == "orbax" and report.unwrapped == ("step 0",)
    found = zoo.pretrained.flatten(variables)
    same({k: np.asarray(v) for k, v in found.items()}, wanted_leaves(arrays))
    (tmp_path / "run" / "0" / "state" / "manifest.ocdbt").write_bytes(b"")
    with pytest.raises(zoo.WeightsError, match="manifest.ocdbt has 0 bytes"):
        zoo.load_pretrained("toy_tiny", tmp_path / "run")


def test_nothing_is_overwritten(tmp_path):
    arrays = torch_arrays()
    for ending in ENDINGS:
        path = tmp_path / f"a{ending}"
        zoo.convert("toy_tiny", arrays, path)
        with pytest.raises(FileExistsError, match="exists; it is replaced only where overwrite"):
            zoo.convert("toy_tiny", arrays, path)
        doubled = {k: 2 * v for k, v in arrays.items()}
        zoo.convert("toy_tiny", doubled, path, overwrite=True)
        same(read_weights(path), doubled if ending else wanted_leaves(doubled))
    (tmp_path / "a" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="holds more than checkpoints: it is never replaced"):
        zoo.convert("toy_tiny", arrays, tmp_path / "a", overwrite=True)
    (tmp_path / "b").write_text("mine")
    with pytest.raises(FileExistsError, match="is a file, a checkpoint directory does not replace it"):
        zoo.convert("toy_tiny", arrays, tmp_path / "b", overwrite=True)
    (tmp_path / "c.npz").mkdir()
    with pytest.raises(FileExistsError, match="it is never replaced"):
        zoo.convert("toy_tiny", arrays, tmp_path / "c.npz", overwrite=True)


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_failure_leaves_nothing(tmp_path, monkeypatch, ending):
    arrays = torch_arrays()
    arrays["head.fc.bias"][3] = 1e30
    target = tmp_path / f"a{ending}"
    with pytest.raises(zoo.WeightsError, match="holds values too large for dtype=float16"):
        zoo.convert("toy_tiny", arrays, target, dtype="float16")
    zoo.convert("toy_tiny", arrays, target)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def fail(*_):
        raise OSError("the disk is full")

    broken = "zoo.formats.orbax_writer.write_digests" if ending == "" else "os.fsync"
    with monkeypatch.context() as patch:
        patch.setattr(broken, fail)
        with pytest.raises(OSError, match="the disk is full"):
            zoo.convert("toy_tiny", torch_arrays(), target, overwrite=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == [target.name]


def test_errors(tmp_path):
    arrays = torch_arrays()

    def error(kind, message, destination="a.npz", source=arrays, name="toy_tiny", **options):
        with pytest.raises(kind, match=message):
            zoo.convert(name, source, tmp_path / destination, **options)

    error(ValueError, r"\.h5 files cannot be written, only \.safetensors, \.npz, \.pth, \.pt and", destination="a.h5")
    error(ValueError, "unknown naming 'torsh' of family 'toy'; did you mean 'torch'", naming="torsh")
    error(ValueError, "a checkpoint directory holds variables under their own", destination="a", naming="torch")
    error(ValueError, "unknown dtype 'float31'; did you mean 'float32'", dtype="float31")
    error(ValueError, "did you mean 'toy_tiny'", name="toy_tinny")
    error(ValueError, "another draws a new classifier", num_classes=7)
    error(zoo.WeightsError, "no such file", source=tmp_path / "absent.pth")
    error(zoo.WeightsError, "does not fit toy_deep", name="toy_deep")
    error(zoo.WeightsError, "have no place for some leaves; naming= may be", naming="tower")
    error(OSError, "cannot create a file here", destination="absent/a.npz")
    error(OSError, "cannot create a directory here", destination="absent/a")
    assert list(tmp_path.iterdir()) == []


class Unpickler(pickle.Unpickler):
    """The standard library's own, with stand-ins for what torch would be asked for."""

    def find_class(self, module, name):
        return {"_rebuild_tensor_v2": lambda *given: given, "OrderedDict": dict}.get(name, f"{module}.{name}")

    def persistent_load(self, identity):
        return identity


def test_torch_files(tmp_path):
    """What `torch.load` finds; our own reader is held against real files of torch elsewhere."""
    large = 1 << 32
    arrays = {
        "w": np.ones((2, 3, 4), np.float32),
        "scalar": np.array(2, np.int64),
        "empty": np.ones((0, 2), np.float16),
    }
    with open(tmp_path / "a.pth", "wb") as file:
        write_torch(file, {k: (v.shape, v.dtype, lambda v=v: v) for k, v in arrays.items()})
    with zipfile.ZipFile(tmp_path / "a.pth") as archive:
        assert archive.testzip() is None
        names = archive.namelist()
        found = Unpickler(io.BytesIO(archive.read("archive/data.pkl"))).load()
        assert archive.read("archive/version") == b"3\n" and archive.read("archive/byteorder") == b"little"
        storages = [archive.read(f"archive/data/{key}") for key in range(3)]
    assert names[0] == "archive/data.pkl" and len(names) == 6
    assert found == {
        "w": (("storage", "torch.FloatStorage", "0", "cpu", 24), 0, (2, 3, 4), (12, 4, 1), False, {}),
        "scalar": (("storage", "torch.LongStorage", "1", "cpu", 1), 0, (), (), False, {}),
        "empty": (("storage", "torch.HalfStorage", "2", "cpu", 0), 0, (0, 2), (2, 1), False, {}),
    }
    assert storages == [array.tobytes() for array in arrays.values()]
    same(read_weights(tmp_path / "a.pth"), arrays)
    # Every storage begins where 64 bytes do.
    raw = (tmp_path / "a.pth").read_bytes()
    assert raw.index(storages[0]) % 64 == 0
    described = zoo.formats.torch_writer._pickled({"w": ((large, DIM), np.dtype(np.int8), lambda: np.zeros(0))})
    assert Unpickler(io.BytesIO(described)).load()["w"][0][-1] == large * DIM
    with pytest.raises(ValueError, match="torch has no storage of dtype uint16, which 'w' has"):
        write_weights(tmp_path / "b.pth", {"w": ((2,), np.dtype(np.uint16), lambda: np.zeros(2, np.uint16))})
    assert not (tmp_path / "b.pth").exists()
