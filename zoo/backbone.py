"""The weights of a ViT for a model that is built on one."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from zoo.errors import WeightsError
from zoo.keymap import flatten, unflatten


def with_backbone(variables: Mapping[str, Any], backbone: Mapping[str, Any]) -> dict[str, Any]:
    """A model's variables with stem, blocks and last norm of a ViT.

    Args:
        variables: of the model, such as a `zoo.ahan.AHAN`; all that a ViT does not have stays as it is.
        backbone: of a `zoo.vit.ViT` with the same sizes, from `zoo.load_pretrained` say; its classifiers are left out.

    Returns:
        New variables in the dtypes of `variables`.

    Raises:
        WeightsError: listing what the ViT has and the model does not, or in another shape, and the reverse.
    """
    ours, theirs = flatten(variables), flatten(backbone)

    def of_backbone(path: str) -> bool:
        return path.startswith(("params/stem/", "params/stages_", "params/head_norm/"))

    taken = {path: leaf for path, leaf in theirs.items() if of_backbone(path)}
    problems = {
        "missing": [f"{path!r} {leaf.shape}" for path, leaf in ours.items() if of_backbone(path) and path not in taken],
        "unexpected": [f"{path!r} {leaf.shape}" for path, leaf in taken.items() if path not in ours],
        "misshapen": [
            f"{path!r} is {np.shape(leaf)}, {ours[path].shape} is wanted"
            for path, leaf in taken.items()
            if path in ours and np.shape(leaf) != ours[path].shape
        ],
    }
    if any(problems.values()):
        raise WeightsError("the backbone does not fit the model", problems)
    return unflatten(ours | {path: leaf.astype(ours[path].dtype) for path, leaf in taken.items()})
