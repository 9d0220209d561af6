"""The ladder: every rung passes, fails and stays unchecked where it should, and all that is wrong is said at once."""

import dataclasses
import hashlib
import json

import numpy as np
import pytest
import safetensors.numpy

import zoo
from tests.toy_family import (
    FAMILY,
    tensorflow_arrays,
    torch_arrays,
)

pytestmark = pytest.mark.usefixtures("toy")

RUNGS = ["names and shapes", "counts", "digest", "finite", "reference"]


@pytest.fixture
def saved(tmp_path):
    """Writes arrays to a file and returns its path."""

    def save(arrays, name="weights.safetensors"):
        safetensors.numpy.save_file(arrays, tmp_path / name)
        return tmp_path / name

    return save


def outcomes(report):
    assert [rung.name for rung in report.rungs] == RUNGS
    assert report.passed == all(rung.outcome != "failed" for rung in report.rungs)
    return {rung.name: rung.outcome for rung in report.rungs}


def rung(report, name):
    return next(rung for rung in report.rungs if rung.name == name)


def test_good_weights(saved):
    path = saved(torch_arrays())
    report = zoo.verify("toy_tiny.hub", path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert str(report).splitlines() == [
        f"{path} as toy_tiny.hub",
        f"  sha256 {digest}",
        "  names and shapes  passed       16 leaves, names as in torch",
        "  counts            passed       878 parameters and 16 statistics, as many as the model has",
        "  digest            not checked  digest unknown: none is on record for this tag",
        "  finite            passed       all 894 numbers",
        "  reference         not checked  no reference activations are stored; a file of them can be given",
        "nothing failed, 2 not checked",
    ]
    parsed = json.loads(report.to_json())
    assert parsed["passed"] is True and parsed["sha256"] == digest and parsed["load"]["naming"] == "torch"
    assert [found["name"] for found in parsed["rungs"]] == RUNGS
    assert set(parsed) == {field.name for field in dataclasses.fields(report)}


def test_digests(saved, monkeypatch):
    path = saved(torch_arrays())
    report = zoo.verify("toy_tiny.known", path)
    assert outcomes(report)["digest"] == "failed" and not report.passed
    assert rung(report, "digest").detail == f"the sha256 on record is {'0' * 64}"
    right = dataclasses.replace(FAMILY.pretrained["toy_tiny.known"], sha256=report.sha256)
    monkeypatch.setitem(FAMILY.pretrained, "toy_tiny.known", right)
    assert outcomes(zoo.verify("toy_tiny.known", path))["digest"] == "passed"
    # Neither a name without a tag nor what is not one file has a digest to be held against.
    assert "no tag was named" in rung(zoo.verify("toy_tiny", path), "digest").detail
    report = zoo.verify("toy_tiny.known", torch_arrays())
    assert outcomes(report)["digest"] == "not checked" and "not one file" in rung(report, "digest").detail


def test_all_problems_at_once(saved):
    arrays = torch_arrays()
    arrays["renamed"] = arrays.pop("stem.bn.bias")
    arrays["head.fc.weight"] = arrays["head.fc.weight"].T.copy()
    arrays["blocks.0.table"][1, 2, 3] = np.nan
    report = zoo.verify("toy_tiny.known", saved(arrays))
    found = outcomes(report)
    assert [found[name] for name in RUNGS] == ["failed", "not checked", "failed", "failed", "not checked"]
    names, finite = rung(report, "names and shapes"), rung(report, "finite")
    assert names.detail == "1 missing, 1 unexpected, 1 misshapen"
    assert set(names.problems) == {"missing", "unexpected", "misshapen"}
    assert finite.problems == {
        "not finite": ("'blocks.0.table' holds 1 NaN or infinite values, the first at [1, 2, 3]",)
    }
    assert "894 numbers, the model 878 parameters and 16 statistics" in rung(report, "counts").detail
    text = str(report)
    for problem in ("'stem.bn.bias' (8,)", "'renamed' (8,)", "looks transposed", "the first at [1, 2, 3]"):
        assert problem in text
    assert text.splitlines()[-1] == "3 of 5 failed, 2 not checked"
    assert json.loads(report.to_json())["rungs"][0]["problems"]["missing"] == list(names.problems["missing"])


def test_values_alone(saved):
    arrays = torch_arrays()
    arrays["stem.bn.weight"][3] = np.inf
    found = outcomes(zoo.verify("toy_tiny", saved(arrays)))
    assert found["names and shapes"] == "passed" and found["finite"] == "failed"


def test_weights_of_something_else(saved):
    report = zoo.verify("toy_tiny", saved({"conv.weight": np.ones((3, 3), np.float32)}))
    found = outcomes(report)
    assert found["names and shapes"] == "failed" and found["finite"] == "not checked"
    assert "none of its 1 names is one of toy's" in rung(report, "names and shapes").detail


def test_other_numbers_of_classes_and_channels(saved):
    path = saved(torch_arrays(classes=7, chans=1))
    report = zoo.verify("toy_tiny.hub", path)
    assert outcomes(report)["counts"] == "failed" and outcomes(report)["names and shapes"] == "passed"
    detail = rung(report, "counts").detail
    assert detail.endswith("; num_classes=7, not 10; in_chans=1, not 3") and "the model has 878 and 16" in detail
    assert zoo.verify("toy_tiny.hub", path, num_classes=7, in_chans=1).passed


def test_what_was_done_to_the_names_is_said(saved):
    arrays = {key: value.astype(np.float16) for key, value in torch_arrays(span=9).items()}
    arrays |= {"stem.bn.num_batches_tracked": np.array(3)}
    detail = rung(zoo.verify("toy_tiny", saved(arrays)), "names and shapes").detail
    assert detail.startswith(
        "16 leaves, names as in torch; 16 cast float16 -> float32; 2 resized (2, 9, 9) -> (2, 5, 5)"
    )
    assert detail.endswith("1 left out (a counter of training steps)")
    raw = tensorflow_arrays(torch_arrays())
    both = raw | {f"{key}/ExponentialMovingAverage": value for key, value in raw.items()}
    for kind in ("ema", "raw"):
        assert f"; {kind} weights;" in rung(zoo.verify("toy_tiny", both, weights=kind), "names and shapes").detail


def test_reference_outputs(saved, tmp_path):
    arrays = torch_arrays()
    arrays["stem.bn.running_var"] = np.abs(arrays["stem.bn.running_var"])
    path = saved(arrays)
    model, variables, _ = zoo.load_pretrained("toy_tiny", path)
    images = np.random.default_rng(0).standard_normal((2, 12, 12, 3), np.float32)
    logits = np.asarray(model.apply(variables, images))

    def outcome(**arrays):
        np.savez(tmp_path / "reference.npz", **arrays)
        return rung(zoo.verify("toy_tiny", path, reference=tmp_path / "reference.npz"), "reference")

    assert outcome(images=images, logits=logits).outcome == "passed"
    off = logits.copy()
    off[1, 4] += 0.25
    found = outcome(images=images, logits=off)
    assert found.outcome == "failed" and "differ by at most 0.25, 0.0001 is allowed" in found.detail
    assert outcome(images=images, logits=off, atol=0.3).outcome == "passed"
    assert outcome(images=images, logits=np.full_like(logits, np.nan)).outcome == "failed"
    found = outcome(images=images, logits=logits[:, :4])
    assert found.outcome == "failed" and "logits are (2, 10), those of the reference (2, 4)" in found.detail
    with pytest.raises(ValueError, match="images and logits, logits is not in it"):
        outcome(images=images)
    with pytest.raises(ValueError, match=r"got \(12, 12, 3\) and \(2, 10\)"):
        outcome(images=images[0], logits=logits)
    with pytest.raises(ValueError, match="images have 1 channels, the model takes 3"):
        outcome(images=images[..., :1], logits=logits)


def test_what_cannot_be_checked(saved, tmp_path):
    with pytest.raises(zoo.WeightsError, match="no such file"):
        zoo.verify("toy_tiny", tmp_path / "absent.safetensors")
    path = saved(torch_arrays())
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(zoo.WeightsError, match="truncated at byte"):
        zoo.verify("toy_tiny", path)
    with pytest.raises(ValueError, match="did you mean 'toy_tiny.hub'"):
        zoo.verify("toy_tiny.hup", path)
    with pytest.raises(TypeError, match="did you mean 'depth'"):
        zoo.verify("toy_tiny", path, dept=3)
