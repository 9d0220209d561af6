"""Writes `torch/zip.pth`, `torch/legacy.pth` and `torch/whole_module.pth` with torch (2.13 was used).

    python tests/data/make_torch_fixtures.py

`expected` needs numpy only: it is what the tests hold the files against.
"""

import argparse
from pathlib import Path

import ml_dtypes
import numpy as np

DIRECTORY = Path(__file__).parent / "torch"


def expected() -> dict[str, np.ndarray]:
    """The tensors under `state_dict`, as they must be read."""
    base = np.sin(np.arange(24, dtype=np.float64)).reshape(4, 6)
    return {
        "double": base,
        "float": base.astype(np.float32),
        "half": base.astype(np.float16),
        "bfloat16": base.astype(np.float32).astype(ml_dtypes.bfloat16),
        "transposed": base.astype(np.float32).T,
        "row_of_float": base.astype(np.float32)[2, 1:5],
        "parameter": np.full((2, 1, 3), 0.5, np.float32),
        "int64": np.arange(-2, 3),
        "uint8": np.arange(5, dtype=np.uint8),
        "bool": np.array([True, False, True]),
        "scalar": np.array(7, np.int64),
        "empty": np.zeros((0, 3), np.float32),
    }


def main() -> None:
    import torch

    arrays = expected()
    bfloat16, rest = arrays["bfloat16"], {k: torch.tensor(v) for k, v in arrays.items() if k != "bfloat16"}
    tensors = {**rest, "bfloat16": torch.tensor(bfloat16.astype(np.float32)).to(torch.bfloat16)}
    # Views that share a storage, and a parameter, are pickled in ways of their own.
    tensors["transposed"] = tensors["float"].T
    tensors["row_of_float"] = tensors["float"][2, 1:5]
    tensors["parameter"] = torch.nn.Parameter(tensors["parameter"])
    module = torch.nn.Module()
    state_dict = module.state_dict()  # an OrderedDict with `_metadata`
    state_dict.update(tensors)
    checkpoint = {
        "state_dict": state_dict,
        "epoch": 3,
        "args": argparse.Namespace(lr=0.1, betas=(0.9, 0.999), name=None),
        "best": np.float64(81.5),
        "optimizer": {"state": {0: {"step": torch.tensor(4.0)}}, "param_groups": [{"params": [0]}]},
    }
    DIRECTORY.mkdir(exist_ok=True)
    torch.save(checkpoint, DIRECTORY / "zip.pth")
    torch.save(checkpoint, DIRECTORY / "legacy.pth", _use_new_zipfile_serialization=False)
    torch.save(torch.nn.Linear(2, 2), DIRECTORY / "whole_module.pth")


if __name__ == "__main__":
    main()
