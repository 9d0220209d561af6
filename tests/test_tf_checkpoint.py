"""TensorFlow checkpoints: as TensorFlow reads them, without TensorFlow, and every damage told."""

import shutil
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from etils import epath

from tests.data.make_tf_fixtures import DIRECTORY
from tests.tf_checkpoints import (
    HEADER,
    beside,
    entry,
    field,
    mask,
    slow_crc32c,
    write_checkpoint,
    write_index,
    write_parts,
)
from tests.toy_family import assert_leaves, tensorflow_arrays, torch_arrays, wanted_leaves
from zoo import load_pretrained
from zoo.errors import WeightsError
from zoo.formats import crc32c
from zoo.formats.crc32c import masked_crc32c
from zoo.formats.readers import open_source, read_weights

pytestmark = pytest.mark.usefixtures("toy")

PREFIXES = {
    "saver": DIRECTORY / "saver" / "model.ckpt-7",
    "objects": DIRECTORY / "objects" / "ckpt-1",
    "sharded": DIRECTORY / "sharded" / "model.ckpt",
}
STRINGS = {"saver": ("types/string",), "objects": ("_CHECKPOINTABLE_OBJECT_GRAPH",), "sharded": ()}


def expected(name):
    """What TensorFlow reads from a fixture."""
    with np.load(DIRECTORY / f"{name}.npz") as loaded:
        arrays = dict(loaded)
    bfloat16 = {k: v.view(ml_dtypes.bfloat16) for k, v in arrays.items() if v.dtype == np.dtype("V2")}
    return arrays | bfloat16


def same(actual, wanted):
    return set(actual) == set(wanted) and all(
        (actual[k].dtype, actual[k].shape, actual[k].tobytes()) == (v.dtype, v.shape, v.tobytes())
        for k, v in wanted.items()
    )


@pytest.fixture
def copy(tmp_path):
    """Copies a fixture to where it may be damaged, and gives its prefix there."""

    def copied(name):
        shutil.copytree(PREFIXES[name].parent, tmp_path / name)
        return tmp_path / name / PREFIXES[name].name

    return copied


@pytest.mark.parametrize("name", PREFIXES)
def test_as_tensorflow_reads_them(name):
    source = open_source(PREFIXES[name])
    assert same(source.arrays, expected(name))
    assert (source.format, source.path) == ("tensorflow", str(PREFIXES[name]))
    assert source.beside == STRINGS[name]
    assert (source.sha256, source.weights, source.unwrapped) == (None, None, ())
    assert not any(array.flags.writeable for array in source.arrays.values())


def test_names_stay_as_they_are():
    q = "maxvit/block_00_00/attention/q/weight"
    assert {q, f"{q}/ExponentialMovingAverage", "global_step"} < set(read_weights(PREFIXES["saver"]))
    wanted = {"layer/kernel/.ATTRIBUTES/VARIABLE_VALUE", "save_counter/.ATTRIBUTES/VARIABLE_VALUE"}
    assert wanted < set(read_weights(PREFIXES["objects"]))


def test_all_ways_to_name_one(copy, monkeypatch):
    prefix = copy("saver")
    files = [beside(prefix, ending) for ending in (".index", ".data-00000-of-00001", ".meta")]
    files[2].write_bytes(b"the graph, which is not read")
    for source in (prefix, *files, prefix.parent):
        assert open_source(source).path == open_source(str(source)).path == str(prefix), source
    monkeypatch.chdir(prefix.parent)
    assert same(read_weights(prefix.name), expected("saver"))
    # The file `checkpoint` names one of several, or the only one needs no such file.
    shutil.copy(files[0], prefix.with_name("model.ckpt-8.index"))
    assert open_source(prefix.parent).path == str(prefix)
    assert same(read_weights(DIRECTORY / "sharded"), expected("sharded"))


def test_neither_tensorflow_nor_copies():
    code = f"import sys; from zoo.formats.readers import open_source; open_source({str(PREFIXES['saver'])!r})"
    subprocess.run([sys.executable, "-c", f"{code}; sys.exit('tensorflow' in sys.modules)"], check=True)
    assert not read_weights(PREFIXES["sharded"])["a/kernel"].flags.owndata


@pytest.mark.parametrize("path", ("model.ckpt-7", "../saver/model.ckpt-7", "/home/them/run/model.ckpt-7"))
def test_state_files(copy, path):
    prefix = copy("saver")
    text = f'all_model_checkpoint_paths: "x"\nmodel_checkpoint_path: "{path}"\n'
    prefix.with_name("checkpoint").write_text(text)
    assert same(read_weights(prefix.parent), expected("saver"))


def test_state_files_name_bytes_by_their_octal_number(copy):
    prefix = copy("saver")
    for file in prefix.parent.iterdir():
        file.rename(file.with_name(file.name.replace("model", "größe")))
    prefix.with_name("checkpoint").write_bytes(rb'model_checkpoint_path: "gr\303\266\303\237e.ckpt-7"')
    assert same(read_weights(prefix.parent), expected("saver"))


def test_directories_that_name_none(copy):
    prefix = copy("saver")
    state, directory = prefix.with_name("checkpoint"), prefix.parent
    state.write_text('model_checkpoint_path: "model.ckpt-9"')
    with pytest.raises(WeightsError, match="names 'model.ckpt-9', which is not there; it holds 'model.ckpt-7'"):
        open_source(directory)
    state.write_bytes(b"\x00\xff")
    with pytest.raises(WeightsError, match=r"checkpoint: damaged: it has no line model_checkpoint_path: "):
        open_source(directory)
    state.unlink()
    shutil.copy(beside(prefix, ".index"), prefix.with_name("model.ckpt-8.index"))
    with pytest.raises(WeightsError, match="it holds 'model.ckpt-7', 'model.ckpt-8'; pass the path of one of them"):
        open_source(directory)
    for name in ("model.ckpt-7", "model.ckpt-8"):
        prefix.with_name(f"{name}.index").unlink()
    with pytest.raises(WeightsError, match="no checkpoints in .*expected folders named by their step"):
        open_source(directory)


def test_paths_that_name_none(copy):
    prefix = copy("saver")
    with pytest.raises(WeightsError, match="no such file; nearest TensorFlow checkpoint: 'model.ckpt-7'"):
        open_source(prefix.with_name("model.ckpt-70"))
    with pytest.raises(WeightsError, match="no such file$"):
        open_source(prefix.with_name("weights.npz"))
    beside(prefix, ".index").unlink()
    with pytest.raises(WeightsError, match=r"model.ckpt-7.index: no such file; without it nothing says"):
        open_source(beside(prefix, ".data-00000-of-00001"))


def test_directories_that_are_not_on_a_disk():
    found = ["gs://bucket/run/model.ckpt-7.index"]
    with (
        epath.testing.mock_epath(isdir=lambda _, path: True, glob=lambda _, path: found),
        pytest.raises(WeightsError, match="gs://bucket/run: .* is read from a disk only; copy its files there"),
    ):
        open_source("gs://bucket/run")


def test_checksums(monkeypatch):
    # RFC 3720, appendix B.4, and the check value of the catalogues of CRCs.
    known = {bytes(32): 0x8A9136AA, b"\xff" * 32: 0x62A8AB43, bytes(range(32)): 0x46DD794E, b"123456789": 0xE3069283}
    for data, crc in known.items():
        assert masked_crc32c(data) == mask(crc)
    data = np.random.default_rng(0).bytes(300_000)
    folded, runs = crc32c._FOLDS[-1], 16 * crc32c._FOLDS[-1]
    lengths = (*range(6), *range(folded - 5, folded + 5), 2 * folded, runs - 4, runs + 9, runs + folded, len(data))
    for length in lengths:
        assert masked_crc32c(data[:length]) == mask(slow_crc32c(data[:length])), length
    whole = masked_crc32c(data)
    for chunk in (1000, 50_000, 150_000, 299_999):
        monkeypatch.setattr(crc32c, "_CHUNK", chunk)
        assert masked_crc32c(np.frombuffer(data, np.uint8)) == whole


@pytest.mark.parametrize("name", PREFIXES)
def test_truncated_indices(copy, name):
    prefix = copy(name)
    index = beside(prefix, ".index")
    data = index.read_bytes()
    for size in range(len(data)):
        index.write_bytes(data[:size])
        with pytest.raises(WeightsError, match=rf"\.index: truncated at byte {size}, or not of TensorFlow"):
            read_weights(prefix)


@pytest.mark.parametrize("name", PREFIXES)
@pytest.mark.parametrize("ending", (".index", ".data-00000-of-0000"))
def test_flipped_bits(copy, name, ending):
    """A flipped bit anywhere is an error that names the file, or nothing was read from there."""
    prefix, wanted = copy(name), expected(name)
    (file,) = (path for path in prefix.parent.iterdir() if path.name.startswith(prefix.name + ending))
    data = file.read_bytes()
    generator = np.random.default_rng(0)
    positions = range(len(data)) if ending == ".index" else generator.permutation(len(data))[:100]
    harmless = 0
    for position in positions:
        damaged = bytearray(data)
        damaged[position] ^= 1 << int(generator.integers(8))
        file.write_bytes(damaged)
        try:
            assert same(read_weights(prefix), wanted), position
            harmless += 1
        except WeightsError as error:
            assert str(error).startswith(str(file)), position
            if ending != ".index":
                assert "fails its checksum" in str(error) and any(repr(name) in str(error) for name in wanted)
    # The footer of an index is filled up to 40 bytes; objects keep the graph of what they are as a string.
    assert harmless <= (40 if ending == ".index" else 0 if name != "objects" else 90)


@pytest.mark.parametrize("name", PREFIXES)
def test_shards_missing_or_truncated(copy, name):
    prefix = copy(name)
    for shard in sorted(prefix.parent.glob("*.data-*")):
        data = shard.read_bytes()
        shard.unlink()
        with pytest.raises(WeightsError, match=f"{shard.name}: no such file; {prefix.name}.index wants it beside"):
            read_weights(prefix)
        for size in (0, 1, len(data) // 2, len(data) - 1):
            shard.write_bytes(data[:size])
            message = f"{shard.name}: truncated at byte {size}: its tensors end at byte {len(data)}"
            with pytest.raises(WeightsError, match=message):
                read_weights(prefix)
        shard.write_bytes(data)
    assert same(read_weights(prefix), expected(name))


X = {"x": np.arange(6, dtype=np.float32).reshape(2, 3)}


@pytest.mark.parametrize("per_block", (1, 2, 100))
def test_many_blocks(tmp_path, per_block):
    arrays = {f"layer_{i:03}/{name}": np.full((i, 2), i, np.float32) for i in range(20) for name in ("bias", "kernel")}
    arrays |= {"global_step": np.array(3, np.int64), "half": np.ones(3, ml_dtypes.bfloat16)}
    write_checkpoint(tmp_path / "model", arrays, per_block=per_block)
    assert same(read_weights(tmp_path / "model"), arrays)


def test_empty_shards(tmp_path):
    arrays = {"none": np.zeros((0, 3), np.float32)}
    write_checkpoint(tmp_path / "model", arrays)
    assert same(read_weights(tmp_path / "model"), arrays)
    write_index(tmp_path / "model", [(b"", HEADER)])
    with pytest.raises(WeightsError, match="model holds no tensors"):
        read_weights(tmp_path / "model")


@pytest.mark.parametrize(
    ("options", "message"),
    (
        (dict(method=1), r"\.index: compressed with snappy, which TensorFlow does not do: save it again"),
        (dict(method=4), r"\.index: compressed by method 4"),
        (dict(header=HEADER + field(2, 1)), r"\.index: written on a big-endian machine: save it again on a little-"),
        (dict(header=field(1, 1) + field(3, field(2, 2))), r"\.index: written in version 2 .*; known: up to 1"),
        (dict(header=field(1, 1) + field(3, 1)), r"\.index: damaged: field 3 .* has wire type 0"),
        (dict(dtype=15), r"data-00000-of-00001: 'x' has TensorFlow's dtype number 15; known: float32, float64,"),
        (dict(shape=(2, 2)), r"data-00000-of-00001: damaged: 'x' float32\[2, 2\] does not fill the bytes 0 to 24"),
        (dict(shape=(1 << 40, 1 << 40)), r"\.index: damaged: the shape .* is not that of an array"),
        (dict(shape=(0, 1 << 63)), r"\.index: damaged: the shape .* is not that of an array"),
        (dict(shape=(1,) * 40), r"\.index: damaged: the shape .* is not that of an array"),
        (dict(crc=0), r"data-00000-of-00001: damaged: 'x', the bytes 0 to 24, fails its checksum"),
    ),
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_files_that_tensorflow_would_not_write(tmp_path, options, message):
    write_checkpoint(tmp_path / "model", X)
    assert same(read_weights(tmp_path / "model"), X)
    write_checkpoint(tmp_path / "model", X, **options)
    with pytest.raises(WeightsError, match=message):
        read_weights(tmp_path / "model")


def test_indices_that_tensorflow_would_not_write(tmp_path):
    good = entry(X["x"], 0, X["x"].tobytes())
    for pairs, message in (
        ([(b"x", good)], "its header is missing"),
        ([(b"", HEADER), (b"y", good), (b"x", good)], "its key b'x' is out of order"),
        ([(b"", HEADER), (b"x", good), (b"x", good)], "its key b'x' is out of order"),
        ([(b"", HEADER), (b"x", good[:-1])], "field 6 of an entry is cut short"),
        ([(b"", HEADER), (b"x", b"\xff" * 11)], "a number at byte 0 has no end"),
        ([(b"", HEADER), (b"x", b"\x0b")], "a field has wire type 3"),
        ([(b"", HEADER), (b"\xff", good)], "can't decode byte 0xff"),
        ([(b"", HEADER), (b"\0x", field(7, b""))], "a part of a tensor has parts"),
        ([(b"", HEADER), (b"x", field(1, 1) + field(7, b""))], r"the parts of 'x' do not make up \[\]"),
    ):
        beside(tmp_path / "model", ".data-00000-of-00001").write_bytes(X["x"].tobytes())
        write_index(tmp_path / "model", pairs)
        with pytest.raises(WeightsError, match=rf"model\.index: damaged: .*{message}"):
            read_weights(tmp_path / "model")


def test_parts_must_make_up_the_whole(tmp_path):
    def key(*numbers):
        # Spelled out: the number of axes, then by axis start and length, -1 for all, with a bit flipped.
        return b"\0x\0\1" + bytes([1, len(numbers) // 2]) + bytes(0x80 ^ n & 255 for n in numbers)

    path, row = tmp_path / "x", (1, 3)
    upper, lower, below, short = ((0, 1), (0, 0)), ((1, 1), (0, 0)), ((2, 1), (0, 0)), ((1, 1),)
    keys = {upper: key(0, 1, 0, -1), lower: key(1, 1, 0, -1), below: key(2, 1, 0, -1), short: key(1, 1)}
    write_parts(path, (2, 3), (upper, lower), [(keys[upper], row), (keys[lower], row)])
    assert same(read_weights(path), {"x": np.ones((2, 3), np.float32)})
    for shape, listed, sizes in (
        ((2, 3), (upper,), {upper: row}),
        ((3, 3), (upper, lower), {upper: row, lower: row}),
        ((1 << 30, 1 << 17), (upper, lower), {upper: row, lower: row}),
        ((2, 3), (upper, lower), {upper: row}),
        ((2, 3), (upper, lower), {upper: row, lower: (3, 1)}),
        ((2, 3), (upper, upper), {upper: row}),
        ((2, 3), (upper, below), {upper: row, below: row}),
        ((2, 3), (upper, short), {upper: row, short: row}),
    ):
        write_parts(path, shape, listed, [(keys[part], size) for part, size in sizes.items()])
        with pytest.raises(WeightsError, match=r"x\.index: damaged: the parts of 'x' do not make up "):
            read_weights(path)


def test_load_pretrained(tmp_path):
    """From a directory to a model: averages are taken, and what is left out is reported."""
    raw, average = torch_arrays(), {name: 2 * array for name, array in torch_arrays().items()}
    shadows = tensorflow_arrays(average)
    arrays = {f"{name}/ExponentialMovingAverage": array for name, array in shadows.items() if "/moving_" not in name}
    arrays |= tensorflow_arrays(raw)
    write_checkpoint(tmp_path / "model.ckpt-5", {**arrays, "global_step": np.array(5, np.int64)})
    statistics = {f"stem.bn.running_{name}": raw[f"stem.bn.running_{name}"] for name in ("mean", "var")}
    for weights, wanted in ((None, average | statistics), ("raw", raw)):
        _, variables, report = load_pretrained("toy_tiny", tmp_path, weights=weights)
        assert_leaves(variables, wanted_leaves(wanted))
        assert (report.format, report.naming, report.digest) == ("tensorflow", "tensorflow", "unknown")
        assert (report.source, report.weights) == (str(tmp_path / "model.ckpt-5"), weights or "ema")
        assert report.ignored["outside 'toy/'"] == ("global_step",)
