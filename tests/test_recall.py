"""Generated tasks: against Zoology's generator, independent solvers, and the laws that they claim to follow."""

import concurrent.futures
import hashlib
import json
import multiprocessing
import pathlib
import pickle

import numpy as np
import pytest

from train import listops
from train.mqar import Mqar, MqarZoology
from train.recall import TASKS, open_task

REFERENCE = np.load(pathlib.Path(__file__).parent / "reference" / "recall.npz")
TABLES = json.loads(str(REFERENCE["tables"]))

# A set of each task, small enough to look at every example.
SMALL = {
    "mqar": dict(length=32, num_tokens=40, num_kv_pairs=4),
    "mqar_zoology": dict(length=32, num_tokens=40, num_kv_pairs=4),
    "passkey": dict(length=48, num_tokens=20, digits=3),
    "selective_copy": dict(length=40, num_tokens=9, memorize=6),
    "induction": dict(length=20, num_tokens=7, induction_length=2),
    "listops": dict(length=40, max_depth=4, max_args=4),
    "copy": dict(length=12, symbols=5),
    "sort": dict(length=12, symbols=30),
}


def opened(name, split="train", examples=200, seed=3, **options):
    return open_task(name, split=split, examples=examples, seed=seed, **SMALL[name] | options)


def zoology(case, **options):
    length, pairs, tokens = case["input_seq_len"], case["num_kv_pairs"], case["vocab_size"]
    return MqarZoology(
        length=length,
        num_tokens=tokens,
        num_kv_pairs=pairs,
        power_a=case.get("power_a", 0.01),
        **{"random_non_queries": False} | options,
    )


def stacked(dataset):
    examples = list(dataset.source)
    return {key: np.stack([example[key] for example in examples]) for key in examples[0]}


@pytest.mark.parametrize("name", TABLES["cases"])
def test_zoology_segments(name):
    case = TABLES["cases"][name]
    tokens, labels = zoology(case).segment(case["num_examples"], case["seed"])
    np.testing.assert_array_equal(tokens, REFERENCE[f"{name}/tokens"])
    np.testing.assert_array_equal(labels, REFERENCE[f"{name}/labels"])


def test_zoology_large_segment():
    case = TABLES["large"]
    tokens, labels = zoology(case).segment(case["num_examples"], case["seed"])
    digest = hashlib.sha256(tokens.astype("<i8").tobytes() + labels.astype("<i8").tobytes())
    assert digest.hexdigest() == TABLES["digest"]


def test_zoology_filler():
    """Only what stands in place of the filler differs from the published generator, which fills at random too."""
    case = TABLES["cases"]["full"]
    tokens, labels = zoology(case, random_non_queries=True).segment(case["num_examples"], case["seed"])
    filler = REFERENCE["full/tokens"] == 0
    np.testing.assert_array_equal(labels, REFERENCE["full_random/labels"])
    np.testing.assert_array_equal(tokens[~filler], REFERENCE["full_random/tokens"][~filler])
    assert filler.any() and len(set(tokens[filler])) > 3


@pytest.mark.parametrize("split", ["train", "test"])
def test_zoology_splits(split):
    case = TABLES["segment"]
    dataset = open_task(
        "mqar_zoology",
        split=split,
        examples=case["num_examples"],
        length=case["input_seq_len"],
        seed=123,
        num_tokens=case["vocab_size"],
        num_kv_pairs=case["num_kv_pairs"],
        random_non_queries=False,
    )
    got, labels = stacked(dataset), REFERENCE[f"{split}/labels"]
    np.testing.assert_array_equal(got["tokens"], REFERENCE[f"{split}/tokens"])
    np.testing.assert_array_equal(got["weights"], labels != -100)
    np.testing.assert_array_equal(got["targets"], np.where(labels == -100, 0, labels))


@pytest.mark.parametrize("name", ["mqar", "mqar_zoology"])
@pytest.mark.parametrize("filler", [True, False])
def test_mqar(name, filler):
    pairs, length = 4, 32
    got = stacked(opened(name, random_non_queries=filler))
    weights = got["weights"]
    np.testing.assert_array_equal(weights.sum(1), pairs)
    rows, places = np.nonzero(weights)
    assert (places % 2 == 0).all() and places.min() >= 2 * pairs
    for tokens, targets, weights in zip(got["tokens"], got["targets"], got["weights"]):
        keys, values = tokens[0 : 2 * pairs : 2], tokens[1 : 2 * pairs : 2]
        assert len(set(keys)) == len(set(values)) == pairs
        assert keys.min() >= 1 and keys.max() < 20 <= values.min() and values.max() < 40
        bound = dict(zip(keys, values))
        asked = np.flatnonzero(weights)
        assert {tokens[place]: targets[place] for place in asked} == bound
        rest = np.setdiff1d(np.arange(2 * pairs, length), asked)
        assert filler or (tokens[rest] == 0).all()
    if filler:
        assert set(got["tokens"][:, 2 * pairs :].ravel()) == set(range(40))


def test_mqar_passes():
    got = stacked(opened("mqar", num_passes=3, examples=20))
    np.testing.assert_array_equal(got["tokens"][:, :8], got["tokens"][:, 8:16])
    np.testing.assert_array_equal(got["tokens"][:, :8], got["tokens"][:, 16:24])
    assert np.nonzero(got["weights"])[1].min() >= 24


def test_mqar_follows_zoologys_law():
    """The gaps of the two generators, drawn in different ways, have the same law, key by key."""
    task = Mqar(length=36, num_tokens=64, num_kv_pairs=4, random_non_queries=False)
    count, gaps = 6000, 14
    examples = [task.draw(np.random.default_rng(index)) for index in range(count)]
    exact = zoology(dict(input_seq_len=36, num_kv_pairs=4, vocab_size=64)).segment(count, 0)

    def law(tokens):
        """How often the key of each pair stands in each gap."""
        table = np.zeros((4, gaps))
        for pair in range(4):
            np.add.at(table[pair], np.nonzero(tokens[:, 8::2] == tokens[:, 2 * pair, None])[1], 1)
        return table / count

    ours, theirs = law(np.stack([example["tokens"] for example in examples])), law(exact[0])
    np.testing.assert_allclose(ours.sum(1), 1)
    # Five standard deviations of the difference of two frequencies.
    bound = 5 * np.sqrt((ours * (1 - ours) + theirs * (1 - theirs)) / count)
    assert (np.abs(ours - theirs) < bound).all()
    expected = np.arange(1, gaps + 1) ** -0.99
    first = expected / expected.sum()
    assert (np.abs(ours[0] - first) < 5 * np.sqrt(first * (1 - first) / count)).all()
    keys = np.bincount([example["tokens"][0] for example in examples], minlength=32)[1:32]
    assert (np.abs(keys - count / 31) < 5 * np.sqrt(count / 31)).all()


@pytest.mark.parametrize("depth", [None, 0, 0.5, 1])
def test_passkey(depth):
    got = stacked(opened("passkey", depth=depth))
    starts = []
    for tokens, targets, weights in zip(got["tokens"], got["targets"], got["weights"]):
        (mark,), (ask,) = np.flatnonzero(tokens == 10), np.flatnonzero(tokens == 11)
        key = tokens[mark + 1 : mark + 4]
        assert ask == 45 and (key < 10).all()
        np.testing.assert_array_equal(targets[45:], key)
        np.testing.assert_array_equal(tokens[46:], key[:2])
        np.testing.assert_array_equal(weights, np.arange(48) >= 45)
        starts.append(mark)
    expected = {None: set(range(42)), 0: {0}, 0.5: {round(41 / 2)}, 1: {41}}[depth]
    assert set(starts) <= expected and (depth is None or set(starts) == expected)
    assert depth is not None or {min(starts), max(starts)} == {0, 41}
    assert set(got["tokens"].ravel()) == set(range(20))


def test_induction():
    got = stacked(opened("induction"))
    starts = []
    for tokens, targets, weights in zip(got["tokens"], got["targets"], got["weights"]):
        first, last = np.flatnonzero(tokens == 6)
        assert last == 18 and tokens[19] == tokens[first + 1]
        np.testing.assert_array_equal(targets[18:], tokens[first + 1 : first + 3])
        np.testing.assert_array_equal(weights, np.arange(20) >= 18)
        starts.append(first)
    assert set(starts) == set(range(16))


def test_selective_copy():
    got = stacked(opened("selective_copy"))
    for tokens, targets, weights in zip(got["tokens"], got["targets"], got["weights"]):
        np.testing.assert_array_equal(tokens[34:], 8)
        symbols = tokens[:34][tokens[:34] > 0]
        assert len(symbols) == 6 and symbols.max() <= 7
        np.testing.assert_array_equal(targets[34:], symbols)
        np.testing.assert_array_equal(weights, np.arange(40) >= 34)
    places = np.bincount(np.nonzero(got["tokens"][:, :34])[1], minlength=34)
    assert (np.abs(places - 200 * 6 / 34) < 5 * np.sqrt(200 * 6 / 34)).all()


@pytest.mark.parametrize("name", ["copy", "sort"])
def test_copy_and_sort(name):
    dataset = opened(name)
    got = stacked(dataset)
    assert dataset.source_length == got["source"].shape[1] == 12
    numbers = set()
    for source, mask, tokens, targets, weights, segments in zip(
        *(got[key] for key in ("source", "source_mask", "tokens", "targets", "weights", "segments"))
    ):
        number = int(mask.sum()) - 1
        read, said = source[:number].tolist(), targets[:number].tolist()
        assert min(read) >= 3 and source[number] == targets[number] == 2
        assert said == (sorted(read) if name == "sort" else read)
        assert tokens[: number + 1].tolist() == [1, *said]
        for array in (source, tokens, targets, weights, segments):
            assert not array[number + 1 :].any()
        np.testing.assert_array_equal(weights, mask)
        np.testing.assert_array_equal(segments, mask)
        numbers.add(number)
    assert numbers == set(range(1, 12))


def evaluate(words):
    """A ListOps evaluator of its own kind: rewrites the innermost operation until a digit is left."""
    names = {"[MAX": max, "[MIN": min, "[MED": lambda a: int(np.median(a)), "[SM": lambda a: int(np.sum(a) % 10)}
    while len(words) > 1:
        close = words.index("]")
        begin = max(place for place in range(close) if words[place] in names)
        arguments = [int(word) for word in words[begin + 1 : close]]
        assert len(arguments) >= 2
        words = [*words[:begin], str(names[words[begin]](arguments)), *words[close + 1 :]]
    return int(words[0])


@pytest.mark.parametrize(
    "options, least, levels",
    [
        ({}, 4, {1, 2, 3}),
        (dict(length=200, min_length=100, max_depth=10, max_args=10, examples=50), 100, {2, 3, 4, 5, 6, 7, 8, 9}),
        (dict(max_depth=2, max_args=2), 4, {1}),
    ],
)
def test_listops(options, least, levels):
    dataset = opened("listops", **options)
    got, depths, sizes, operators = stacked(dataset), set(), set(), set()
    for tokens, targets, weights, segments in zip(*(got[key] for key in ("tokens", "targets", "weights", "segments"))):
        words = [listops.NAMES[token] for token in tokens]
        (end,) = np.flatnonzero(weights)
        assert words[end] == "=" and set(words[end + 1 :]) <= {""} and least <= end <= dataset.length - 1
        np.testing.assert_array_equal(segments, np.arange(dataset.length) <= end)
        assert targets[end] == evaluate(words[:end]) and targets.sum() == targets[end]
        nesting = np.cumsum([(word[0] == "[") - (word == "]") for word in words[:end]])
        assert nesting[-1] == 0 and (nesting[:-1] > 0).all()
        depths.add(int(nesting.max()))
        sizes.add(int(end))
        operators |= {word for word in words[:end] if word[0] == "["}
    assert operators == {"[MAX", "[MIN", "[MED", "[SM"}
    assert depths <= levels and len(depths) >= min(len(levels), 3)
    assert sizes == {4} if levels == {1} else len(sizes) > 10


def test_listops_follows_the_grammar():
    """With two levels of up to three arguments, every probability can be written down."""
    dataset = open_task("listops", split="train", examples=4000, length=24, seed=0, max_depth=3, max_args=3)
    got = stacked(dataset)["tokens"]
    # Two or three arguments are equally likely, each an operation with probability 1/4: 5 tokens on average.
    ends = (got == listops.EQUALS).argmax(1)
    plain = {4: 0.5 * 0.75**2, 5: 0.5 * 0.75**3}
    for size, probability in plain.items():
        found = (ends == size).mean()
        assert abs(found - probability) < 5 * np.sqrt(probability * (1 - probability) / 4000)
    mean = 2 + 2.5 * (0.75 + 0.25 * (2 + 2.5))
    assert abs(ends.mean() - mean) < 5 * ends.std() / np.sqrt(4000)


@pytest.mark.parametrize("name", TASKS)
def test_examples_are_alike_in_form(name):
    dataset = opened(name)
    assert len(dataset) == len(dataset.source) == 200
    counted, right = 0, 0.0
    for example in dataset.source:
        for key, dtype in {"tokens": "i4", "targets": "i4", "weights": "f4", "segments": "i4"}.items():
            assert example[key].shape == (dataset.length,) and example[key].dtype == np.dtype(dtype)
        assert ("source" in example) == (dataset.source_length is not None)
        if "source" in example:
            assert example["source"].dtype == np.int32 and example["source_mask"].dtype == bool
        for key in ("tokens", "targets", *(("source",) if "source" in example else ())):
            assert 0 <= example[key].min() and example[key].max() < dataset.vocab_size
        assert set(np.unique(example["weights"])) <= {0.0, 1.0}
        assert not example["targets"][example["weights"] == 0].any()
        assert (example["segments"][example["weights"] > 0] == 1).all()
        counted += example["weights"].sum()
        right += dataset.chance
    answers = {int(t) for e in dataset.source for t in e["targets"][e["weights"] > 0]}
    # All the answers there can be occur, and no others: one guess among them is right that often.
    assert len(answers) == round(1 / dataset.chance)
    assert dataset.detail and counted > 0
    for index in (-1, 200):
        with pytest.raises(IndexError, match=f"example {index} of 200"):
            dataset.source[index]


def digest(source):
    parts = (example[key].tobytes() for example in source for key in sorted(example))
    return hashlib.sha256(b"".join(parts)).hexdigest()


@pytest.mark.parametrize("name", TASKS)
def test_examples_depend_on_seed_split_and_index_alone(name):
    dataset = opened(name, examples=20)
    first = digest(dataset.source)
    assert digest(pickle.loads(pickle.dumps(dataset)).source) == first
    assert digest(opened(name, examples=20).source) == first
    backwards = [dataset.source[index] for index in reversed(range(20))]
    assert digest(reversed(backwards)) == first
    others = [opened(name, examples=20, seed=4), opened(name, "test", examples=20)]
    assert len({first, *(digest(other.source) for other in others)}) == 3
    assert len({dataset.fingerprint, *(other.fingerprint for other in others)}) == 3
    if name != "mqar_zoology":
        more = opened(name, examples=30)
        assert digest(more.source[index] for index in range(20)) == first
        assert more.fingerprint != dataset.fingerprint


def test_examples_in_another_process():
    sources_of_tasks = [opened(name, examples=10).source for name in TASKS]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        elsewhere = list(pool.map(digest, sources_of_tasks))
    assert elsewhere == [digest(source) for source in sources_of_tasks]


def test_fingerprints_tell_options_apart():
    prints = [opened("mqar", **options).fingerprint for options in ({}, {"power_a": 0.1}, {"length": 34})]
    assert len(set(prints)) == 3 and opened("mqar", power_a=0.01).fingerprint == prints[0]


@pytest.mark.parametrize(
    "name, options, words",
    [
        ("mqar", dict(num_kv_pairs=9), "length=32: an even length of at least 36 is needed for 9 pairs"),
        ("mqar", dict(length=33), "length=33: an even length"),
        ("mqar", dict(num_tokens=9), "num_tokens=9: 4 pairs need at least 10"),
        ("mqar", dict(power_a=0.0), "power_a=0.0: it must be above 0"),
        ("mqar", dict(num_kv_pairs=0), "num_kv_pairs=0, num_passes=1: both must be at least 1"),
        ("mqar_zoology", dict(num_passes=2), "num_passes=2: only with 1"),
        ("passkey", dict(length=6), "length=6: a key of 3 digits needs at least 7"),
        ("passkey", dict(num_tokens=11), "num_tokens=11: at least 12"),
        ("passkey", dict(depth=1.5), "depth=1.5: None or from 0 to 1"),
        ("passkey", dict(digits=0), "digits=0: a key has at least 1"),
        ("selective_copy", dict(length=11), "length=11: memorize=6 needs at least 12"),
        ("selective_copy", dict(num_tokens=3), "num_tokens=3: at least 4"),
        ("induction", dict(length=4), "length=4: induction_length=2 needs at least 5"),
        ("induction", dict(num_tokens=2), "num_tokens=2: at least 3"),
        ("listops", dict(length=4), "length=4: at least 5 are needed"),
        ("listops", dict(min_length=40), "length=40: at least 41 are needed for an expression of min_length=40"),
        ("listops", dict(min_length=30, max_depth=3, max_args=2), "min_length=30: .* the longest expression has 10"),
        ("listops", dict(min_length=10, max_depth=2), "min_length=10: .* the longest expression has 6"),
        ("listops", dict(max_depth=1), "max_depth=1: at least 2"),
        ("listops", dict(max_args=1), "max_args=1: an operation has at least 2"),
        ("listops", dict(length=1100, min_length=1093, max_depth=10, max_args=3), "none of 2,000 expressions"),
        ("copy", dict(min_symbols=12), "length=12 with min_symbols=12: .* leave a position for END"),
        ("sort", dict(symbols=1), "symbols=1: at least 2"),
        ("mqar", dict(num_pairs=3), "the task 'mqar' has no option 'num_pairs'; did you mean .*'num_kv_pairs'"),
        ("passkey", dict(digits="3"), "digits='3' of the task 'passkey' must be int"),
        ("mqar", dict(num_kv_pairs=True), "num_kv_pairs=True of the task 'mqar' must be int"),
        ("mqar", dict(power_a=None), r"power_a=None of the task 'mqar' must be float \| int"),
        ("copy", dict(split="valid"), "unknown split 'valid' of the task 'copy', which has train, test"),
        ("copy", dict(examples=0), "examples=0: there must be at least 1"),
        ("copy", dict(seed=-1), "seed=-1: it must not be negative"),
    ],
)
def test_settings_that_cannot_be(name, options, words):
    with pytest.raises(ValueError, match=words):
        opened(name, **options)


def test_unknown_task():
    with pytest.raises(ValueError, match="unknown task 'mqr'; did you mean 'mqar'"):
        open_task("mqr", split="train", examples=1, length=8, seed=0)
