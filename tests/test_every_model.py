"""What holds of every model and every tag, told from one trace of each."""

import collections

import jax
import jaxtyping
import pytest

import zoo
from train import sharding
from zoo import info, registry
from zoo.counts import counts_of

# Of models that differ in size alone, one.
QUICK = {"davit_tiny", "davit_base_fl", "maxvit_tiny_tf_224", "maxvit_tiny_rw_224", "maxvit_rmlp_small_rw_224"}
QUICK |= {"biformer_tiny", "biformer_stl", "biformer_stl_nchw", "care_s0", *zoo.list_models("*_nano")}


def alike():
    """Names of which each makes the same model, at the same size: often a model and the tags of its weights."""
    groups = collections.defaultdict(list)
    for name in (*zoo.list_models(), *zoo.list_models(pretrained=True)):
        groups[repr(info._sized(name, {}))].append(name)
    return groups.values()


@pytest.fixture
def unchecked(request):
    """The annotations are not checked in large models: that takes half of the time, and small ones have the same."""
    jaxtyping.config.update("jaxtyping_disable", request.param)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def case(names):
    quick = not QUICK.isdisjoint(names)
    return pytest.param("_nano" not in names[0], names, id=names[0], marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize("unchecked, names", [case(names) for names in alike()], indirect=["unchecked"])
def test_counts_are_stored_and_parameters_have_a_place(unchecked, names):
    counted, variables = info.traced(names[0], 1, {})
    for name in names:
        assert counts_of(name) == (counted.parameters, counted.macs), name
    mesh = sharding.make_mesh(dict(data=1, fsdp=2, tensor=4, sequence=1))
    rules = registry.family_of(names[0]).sharding_rules
    split = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
        spec = sharding.param_spec(sharding.path_of(path), leaf.shape, rules, mesh)
        split.append((leaf.size, any(spec)))
    # What stays whole are vectors and small kernels, so a device holds far less than the whole.
    assert sum(size for size, is_split in split if is_split) > 0.9 * sum(size for size, _ in split)
