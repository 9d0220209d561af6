"""People and twins, drawn or in folders, and the batches that are made of them."""

import collections
import pickle

import numpy as np
import pytest
from PIL import Image

from train import data, drawn_faces, face_set, faces, twins
from train.identities import IdentityOrder
from train.sources import ArraySource

SMALL = dict(pairs=6, validation_pairs=2, test_pairs=3, singles=2, images=3, eval_images=2, size=24)


def small(split="train", **options):
    return faces.open_faces("twins", split=split, **{**SMALL, **options})


def test_drawn_splits():
    train, test = small(), small("test")
    assert train.num_classes == 14 and len(train) == 42 and train.image_shape == (24, 24, 3)
    assert test.num_classes == 7 and len(test) == 14
    np.testing.assert_array_equal(train.labels, np.repeat(np.arange(14), 3))
    np.testing.assert_array_equal(train.twins, [*(np.arange(12) ^ 1), -1, -1])
    np.testing.assert_array_equal(train.pairs, np.arange(12).reshape(6, 2))
    assert train.hard.sum() == 4 and not train.hard[12:].any() and not train.validation.any()
    assert train.detail == "42 images of 14 people, 6 pairs of twins, 2 of them hard"
    example = train.read(4)
    assert example["image"].dtype == np.uint8 and example["label"] == 1
    assert (example["twin"], example["validation"]) == (0, False) and example["hard"] == train.hard[1]


def test_everything_follows_from_the_seed():
    first = small()
    again = pickle.loads(pickle.dumps(first))
    twins._drawn.cache_clear()
    drawn_anew = small()
    for other in (again, drawn_anew):
        np.testing.assert_array_equal(other.source.images, first.source.images)
        assert other.fingerprint == first.fingerprint
    for options in (dict(seed=1), dict(difficulty=0.4), dict(nuisance=0.5)):
        other = small(**options)
        assert other.fingerprint != first.fingerprint
        assert (other.source.images != first.source.images).mean() > 0.1
    # More people, or more pictures of them, leave the others who they are.
    more = twins.people(twins.Twins(**{**SMALL, "pairs": 7, "images": 4}), "train")
    for one, other in zip(twins.people(twins.Twins(**SMALL), "train")[:12], more):
        assert one.marks == other.marks and one.genes.shape == other.genes.shape


def test_splits_have_other_people():
    settings = twins.Twins(**SMALL)
    found = {split: twins.people(settings, split) for split in twins.SPLITS}
    shapes = [tuple(person.genes.shape.values()) for people in found.values() for person in people]
    counts = collections.Counter(shapes)
    # Twins, and they alone, share their genes.
    assert sorted(counts.values()) == [1] * (2 + 1 + 1) + [2] * (6 + 2 + 3)
    for people in found.values():
        marks = [str(person.marks) for person in people]
        assert len(set(marks)) == len(marks)


def test_what_twins_share_is_symmetric_and_what_they_do_not_is_not():
    genes = drawn_faces.draw_genes(np.random.default_rng(0))
    bare, marked = (drawn_faces.draw_person(genes, np.random.default_rng(1), strength) for strength in (0.0, 1.0))
    face = drawn_faces.portrait(bare, 48)
    np.testing.assert_allclose(face, face[:, ::-1], atol=1e-5)
    marked = drawn_faces.portrait(marked, 48)
    assert np.abs(marked - marked[:, ::-1]).max() > 0.1
    other = drawn_faces.draw_person(genes, np.random.default_rng(2), 0.0)
    np.testing.assert_array_equal(drawn_faces.portrait(other, 48), face)


def test_difficulty_and_hard_pairs():
    def apart(difficulty):
        people = twins.people(twins.Twins(pairs=12, difficulty=difficulty), "train")
        return np.array([twins.difference(people[2 * i], people[2 * i + 1], 32) for i in range(12)])

    easy, middle, same = apart(0.0), apart(0.5), apart(1.0)
    assert (easy > 1.3 * middle).all() and (middle > 0).all() and (same == 0).all()
    strangers = twins.people(twins.Twins(pairs=12), "train")
    assert twins.difference(strangers[0], strangers[2], 32) > 2 * middle.max()
    hard = twins.hardest(middle)
    assert hard.sum() == 4 and middle[hard].max() < middle[~hard].min()
    np.testing.assert_array_equal(twins.hardest(np.zeros(2)), [True, False])
    dataset = faces.open_faces("twins", split="train", pairs=12, singles=0, images=1, size=32)
    np.testing.assert_array_equal(dataset.hard, np.repeat(hard, 2))


def test_pictures_differ_by_nuisance_alone():
    person = twins.people(twins.Twins(), "train")[0]
    still = drawn_faces.photographs(person, 32, 2, np.random.default_rng(0), nuisance=0.0)
    inside = still[:, 8:24, 8:24].astype(int)
    np.testing.assert_array_equal(inside[0], inside[1])
    face = np.clip(drawn_faces.portrait(person, 32), 0, 1)[8:24, 8:24] * 255
    assert np.abs(inside[0] - face).max() <= 1
    moved = drawn_faces.photographs(person, 32, 2, np.random.default_rng(0))[:, 8:24, 8:24].astype(int)
    assert np.abs(moved[0] - moved[1]).mean() > 5


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(pairs=0), "pairs=0: at least 1"),
        (dict(difficulty=1.5), "difficulty=1.5: from 0 to 1"),
        (dict(size=8), "size=8: at least 16"),
        (dict(singles=-1), "singles=-1: at least 0"),
        (dict(nuisance=-1), "nuisance=-1: at least 0"),
        (dict(pairs=2.5), "pairs=2.5: a whole number"),
        (dict(dificulty=0.5), "the drawn twins have no option 'dificulty'; did you mean 'difficulty'"),
    ],
)
def test_errors_of_options(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_errors_of_names():
    with pytest.raises(ValueError, match="unknown data set 'twin' for verification; did you mean 'twins'"):
        faces.open_faces("twin", split="train")
    with pytest.raises(ValueError, match="unknown split 'valid' of the drawn twins, which has train, validation, test"):
        small("valid")
    with pytest.raises(ValueError, match="'twins' is built in and takes none"):
        faces.open_faces("twins", split="train", path="somewhere")
    with pytest.raises(ValueError, match="the folder of people takes no options, got size"):
        faces.open_faces("people", split="train", path="somewhere", size=3)
    with pytest.raises(ValueError, match="data set 'people' needs a path"):
        faces.open_faces("people", split="train")


def test_validation_and_test_as_one():
    both, validation, test = small("validation+test"), small("validation"), small("test")
    shift = validation.num_classes
    assert shift == 5 and both.num_classes == 12 and len(both) == len(validation) + len(test)
    np.testing.assert_array_equal(both.validation, np.arange(12) < shift)
    np.testing.assert_array_equal(both.twins, [1, 0, 3, 2, -1, 6, 5, 8, 7, 10, 9, -1])
    for index in range(len(both)):
        example = both.read(index)
        part, place, first = (validation, index, 0) if index < 10 else (test, index - 10, shift)
        np.testing.assert_array_equal(example["image"], part.read(place)["image"])
        assert example["label"] == both.labels[index] == part.labels[place] + first
        assert example["validation"] == (index < 10)
    with pytest.raises(ValueError, match="'train.validation.test' joins 3 splits; it takes A, or A.B"):
        small("train+validation+test")
    with pytest.raises(ValueError, match="7 people are both in the drawn twins test and in the drawn twins test, such"):
        small("test+test")
    with pytest.raises(ValueError, match="images of shape .24, 24, 3., the drawn twins test of shape .32, 32, 3."):
        face_set.with_validation(validation, small("test", size=32))


PEOPLE = {"ann": 2, "bea": 1, "cyd": 3, "dot": 2, "eve": 1}
LISTS = {"train": ["cyd", "ann", "bea"], "test": ["dot"]}
PAIRS = "identity,twin\nann,bea\n"


@pytest.fixture
def folder(tmp_path):
    """Ann and Bea are twins; Eve is in no split."""

    def make(people=PEOPLE, lists=LISTS, pairs=PAIRS):
        for number, (name, count) in enumerate(people.items()):
            (tmp_path / "images" / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.full((6, 5, 3), 20 * number + i, np.uint8)
                Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.png")
        for split, names in lists.items():
            (tmp_path / f"{split}.txt").write_text("\n".join(names) + "\n\n")
        if pairs is not None:
            (tmp_path / "pairs.csv").write_text(pairs)
        return tmp_path

    return make


def test_folder(folder):
    root = folder()
    (root / "images" / "ann" / "notes.txt").write_text("no image")
    dataset = faces.open_faces("people", split="train", path=root)
    assert dataset.label_names == ("cyd", "ann", "bea") and dataset.image_shape is None
    np.testing.assert_array_equal(dataset.labels, [0, 0, 0, 1, 1, 2])
    np.testing.assert_array_equal(dataset.twins, [-1, 2, 1])
    assert not dataset.hard.any() and dataset.detail == "6 images of 3 people, 1 pairs of twins, 0 of them hard"
    assert dataset.read(4)["image"][0, 0].tolist() == [1, 1, 1] and dataset.read(4)["twin"] == 2
    again = faces.open_faces("people", split="train", path=root)
    assert again.fingerprint == dataset.fingerprint
    (root / "pairs.csv").write_text("\ufeffIdentity, Twin, hard\nbea,ann,1\n\nann,bea,1\n")
    hard = faces.open_faces("people", split="train", path=root)
    np.testing.assert_array_equal(hard.hard, [False, True, True])
    assert hard.fingerprint != dataset.fingerprint
    both = faces.open_faces("people", split="test+train", path=root)
    assert both.label_names == ("dot", "cyd", "ann", "bea") and both.read(5)["image"][0, 0, 0] == 0


def test_a_twin_outside_the_split_is_none(folder):
    root = folder(lists={"train": ["ann", "cyd"], "test": ["dot"]})
    np.testing.assert_array_equal(faces.open_faces("people", split="train", path=root).twins, [-1, -1])


@pytest.mark.parametrize(
    "changed, error, message",
    [
        (dict(pairs=None), FileNotFoundError, "has no pairs.csv; the layout should be images/PERSON"),
        (dict(people=PEOPLE | {"ann": 0}), ValueError, "'ann' of split 'train' has no image in '.*ann': looked for"),
        (dict(lists=LISTS | {"train": ["any"]}), ValueError, "train.txt names 'any', .* did you mean 'ann'"),
        (dict(lists=LISTS | {"test": []}), ValueError, "test.txt of '.*' lists nobody"),
        (dict(lists=LISTS | {"more": ["dot"]}), ValueError, "'dot' is listed in more.txt and again in test.txt"),
        (dict(lists={"test": ["bea"], "train": ["ann"]}), ValueError, "twins 'ann' and 'bea' of .* different splits"),
        (dict(lists={"test": ["dot"]}), ValueError, "unknown split 'train' of the folder .*, which has test"),
        (dict(pairs="identity,twin\nann,zoe\n"), ValueError, "line 2 of pairs.csv names 'zoe', who has no directory"),
        (dict(pairs="identity,twin\nann,ann\n"), ValueError, "line 2 of pairs.csv makes 'ann' a twin of their own"),
        (
            dict(pairs="identity,twin\nann,bea\nbea,cyd\n"),
            ValueError,
            "line 3 of pairs.csv makes 'cyd' the twin of 'bea', whose twin is 'ann' already: there are pairs only",
        ),
        (dict(pairs="identity,twin\nann\n"), ValueError, "line 2 of pairs.csv has 1 cells, 2 are wanted: 'ann'"),
        (dict(pairs="who,twin\nann,bea\n"), ValueError, "begins with 'who,twin'; its head must be identity,twin"),
        (dict(pairs=""), ValueError, "pairs.csv begins with ''; its head must be identity,twin"),
        (dict(pairs="identity,twin,hard\nann,bea,yes\n"), ValueError, "line 2 .* hard must be 0 or 1, got 'yes'"),
        (
            dict(pairs="identity,twin,hard\nann,bea,1\nbea,ann,0\n"),
            ValueError,
            "line 3 of pairs.csv contradicts another line in whether 'bea' and 'ann' are hard",
        ),
    ],
)
def test_folders_that_contradict_themselves(folder, changed, error, message):
    root = folder(**changed)
    with pytest.raises(error, match=message):
        faces.open_faces("people", split="train", path=root)


def test_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="'.*nowhere' is not a directory; the layout should be"):
        faces.open_faces("people", split="train", path=tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="has no images; the layout should be"):
        faces.open_faces("people", split="train", path=tmp_path)


def order(**options):
    """Ten pairs, four people without a twin, of whom the last has one image and all others three."""
    labels = np.append(np.repeat(np.arange(23), 3), 23)
    partners = np.append(np.arange(20) ^ 1, np.full(4, -1))
    return IdentityOrder(labels, partners, **{**dict(batch_size=48, parts=3, images=2), **options})


def test_batches_of_people_and_twins():
    ordered, seen = order(), collections.Counter()
    assert ordered.people == (3, 2)
    for number in range(50):
        batch = ordered(number)
        np.testing.assert_array_equal(batch, order()(number))
        for part in range(3):
            rows = batch[part::3]
            people = collections.Counter(ordered.labels[rows].tolist())
            assert len(rows) == 16 and set(people.values()) == {2} and len(people) == 8
            together = [person for person in people if ordered.twins[person] in people]
            assert len(together) == 6
            seen.update(people.keys())
            for person in people:
                different = len(set(rows[ordered.labels[rows] == person]))
                assert different == (1 if person == 23 else 2)
    assert len(set(map(tuple, (order()(n) for n in range(50))))) == 50
    assert (order(seed=1)(0) != order()(0)).any()
    # 6 of 8 people of 150 parts come in pairs, the other two from everyone else.
    assert min(seen[person] for person in range(20)) > 2 * max(seen[person] for person in range(20, 24))
    assert len(seen) == 24


@pytest.mark.parametrize("share, people", [(0.0, (0, 8)), (0.5, (2, 4)), (1.0, (4, 0)), (0.8, (3, 2))])
def test_share_of_twins(share, people):
    ordered = order(twin_share=share)
    assert ordered.people == people
    labels = set(ordered.labels[ordered(5)[1::3]].tolist())
    assert sum(ordered.twins[person] in labels for person in labels) == 2 * people[0]


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(batch_size=50), "batch_size=50 in 3 parts with 2 images of a person: a multiple of 6 can be shared out"),
        (dict(batch_size=240, parts=1), "wants 45 pairs of twins: there are 10; lower twin_share or batch_size"),
        (dict(batch_size=60, parts=1, twin_share=0.1), "wants 26 people beside its pairs: there are 12 without"),
        (dict(batch_size=6, twin_share=0.75), "twin_share=0.75 of 1 people: that is no pair"),
        (dict(images=0), "images=0: at least 1"),
        (dict(twin_share=1.1), "twin_share=1.1: from 0 to 1"),
    ],
)
def test_batches_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        order(**options)


def _bright(example, rng):
    return {"image": example["image"], "draw": np.float64(rng.random())}


def test_batches_go_on_where_they_were():
    """By any number of processes; twice the same example in a batch has randomness of its own."""
    dataset = small()
    ordered = IdentityOrder(dataset.labels, dataset.twins, batch_size=16, parts=2, images=4)
    how = dict(batch_size=16, seed=3, transform=_bright, order=ordered)

    def first(count, **options):
        with data.train_iterator(dataset, **how, **options) as batches:
            return [next(batches) for _ in range(count)]

    whole = first(4)
    for number, batch in enumerate(whole):
        np.testing.assert_array_equal(batch["index"], ordered(number))
        np.testing.assert_array_equal(batch["label"], dataset.labels[batch["index"]])
        assert len(set(batch["draw"].tolist())) == 16
        for image, index in zip(batch["image"], batch["index"]):
            np.testing.assert_array_equal(image, dataset.source.images[index])
    for later, batch in zip(first(2, start=32), whole[2:]):
        for name in batch:
            np.testing.assert_array_equal(later[name], batch[name])
    halves = [first(1, share=data.Share((index,), 2))[0] for index in (0, 1)]
    for name in whole[0]:
        np.testing.assert_array_equal(np.concatenate([half[name] for half in halves]), whole[0][name])
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(ordered))(2), ordered(2))
    with data.train_iterator(dataset, **how) as batches:
        assert batches.position(3) == data.DataPosition(48, dataset.fingerprint)
    for wrong in (dict(start=8), dict(repeats=2)):
        with pytest.raises(ValueError, match="an order gives whole batches of 16"):
            first(1, **wrong)


def test_a_face_set_of_one_image_each():
    """It can be trained on, repeating images, and cannot be scored."""
    dataset = face_set.FaceSet(
        name="few",
        source=ArraySource(np.zeros((4, 8, 8, 3), np.uint8), np.arange(4)),
        fingerprint="few",
        num_classes=4,
        label_names=tuple("abcd"),
        image_shape=(8, 8, 3),
        channels=3,
        labels=np.arange(4),
        twins=np.array([1, 0, 3, 2]),
        hard=np.zeros(4, bool),
        validation=np.zeros(4, bool),
    )
    rows = IdentityOrder(dataset.labels, dataset.twins, batch_size=8, images=4, twin_share=1.0)(0)
    assert len(set(rows.tolist())) == 2
