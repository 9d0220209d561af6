"""What DESIGN promises of the tree: layers that import in one direction, and one place per idea."""

import ast
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
OURS = {"kernels", "zoo", "train", "configs", "tests"}
# Layer -> what it may import beside the standard library.
MAY_IMPORT = {
    "kernels": {"kernels", "jax", "numpy", "jaxtyping"},
    "zoo": {
        *("zoo", "kernels", "jax", "numpy", "jaxtyping", "flax", "safetensors", "PIL", "ml_dtypes", "etils"),
        *("xxhash", "orbax", "huggingface_hub"),
    },
    "train": None,
    "configs": {"ml_collections"},
}
FILES = {layer: sorted((ROOT / layer).rglob("*.py")) for layer in MAY_IMPORT}


def imported(path: pathlib.Path) -> set[str]:
    """Top-level names of the modules that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module)
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("layer", MAY_IMPORT)
def test_imports_go_one_way(layer):
    for path in FILES[layer]:
        others = imported(path) - set(sys.stdlib_module_names)
        if MAY_IMPORT[layer] is None:
            assert others & OURS <= {"kernels", "zoo", "train"}, path
        else:
            assert others <= MAY_IMPORT[layer], path


def test_only_the_peers_of_the_benchmark_are_imported_by_name():
    """What else there is to compare with is imported where it is installed, by one file."""
    by_name = {path for path in FILES["kernels"] if "import_module" in path.read_text()}
    assert by_name == {ROOT / "kernels" / "bench" / "peers.py"}


def test_only_compat_looks_at_the_version_of_jax():
    for files in FILES.values():
        for path in files:
            if path != ROOT / "kernels" / "compat.py":
                assert "jax.__version__" not in path.read_text() and "version_info" not in path.read_text(), path


def test_a_workdir_may_be_anywhere():
    """What is kept in a workdir goes through etils.epath, so that gs:// works as a disk does."""
    for name in ("loop", "checkpoint", "metrics", "evaluate", "program", "inputs"):
        path = ROOT / "train" / f"{name}.py"
        nodes = list(ast.walk(ast.parse(path.read_text())))
        called = {ast.unparse(node.func) for node in nodes if isinstance(node, ast.Call)}
        assert "open" not in called and "shutil" not in imported(path), name
        assert not any(call.startswith("os.path") for call in called), name


def test_files_are_short_enough_to_read():
    for files in FILES.values():
        for path in files:
            assert len(path.read_text().splitlines()) <= 400, path


def test_the_top_level():
    found = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    generated = {"attention_zoo.egg-info", "build", "dist", "runs"}
    assert found - generated == {
        *("pyproject.toml", "README.md", "LICENSE", "kernels", "zoo", "train", "configs", "tests")
    }
