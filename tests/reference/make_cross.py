"""Writes the reference of RoI-align: outputs and gradients of torchvision's compiled operator in float64.

    pip install torch torchvision
    python -m tests.reference.make_cross

The operators are called by name, since torchvision's function falls back on Python where they cannot be loaded, and
that takes the edge for samples that lie outside the map, for which the operators have zero. Features and the
directions of the gradients come from `weights.py`. Boxes are stored: inside the map, reaching out of it on every
side, wholly outside, without extent, and all of it. Written with torch 2.13.0 and torchvision 0.29.2.
"""

from pathlib import Path

import numpy as np
import torch
import torchvision  # noqa: F401

from tests.reference.weights import pseudo_normal

HERE = Path(__file__).parent
SHAPE = (2, 9, 14, 3)
CASES = (((4, 4), 1), ((4, 4), 2), ((2, 3), 3))
BOXES = (
    ((0.0, 0.0, 1.0, 1.0), (0.21, 0.3, 0.55, 0.72), (0.4, 0.4, 0.4, 0.4), (-0.3, -0.2, 0.4, 0.5), (1.3, 1.2, 1.6, 1.9)),
    ((0.05, 0.6, 0.12, 0.65), (0.7, 0.5, 1.2, 1.1), (-0.1, -0.1, 1.1, 1.1), (0.9, 0.1, 1.0, 0.9), (0.5, 0.0, 0.6, 1.0)),
)


def main():
    boxes = np.asarray(BOXES)
    b, h, w, c = SHAPE
    record = {"boxes": boxes}
    image = np.repeat(np.arange(b), boxes.shape[1])[:, None]
    rois = torch.from_numpy(np.concatenate([image, (boxes * [w, h, w, h]).reshape(-1, 4)], axis=1))
    features = torch.from_numpy(pseudo_normal("features", SHAPE)).permute(0, 3, 1, 2).contiguous()
    for size, ratio in CASES:
        out = torch.ops.torchvision.roi_align(features, rois, 1.0, *size, ratio, True)
        out = out.permute(0, 2, 3, 1).unflatten(0, (b, -1)).numpy()
        direction = torch.from_numpy(pseudo_normal("direction", out.shape)).flatten(0, 1).permute(0, 3, 1, 2)
        gradient = torch.ops.torchvision._roi_align_backward(
            direction.contiguous(), rois, 1.0, *size, b, c, h, w, ratio, True
        )
        name = f"{size[0]}x{size[1]}/{ratio}"
        record |= {f"out/{name}": out, f"gradient/{name}": gradient.permute(0, 2, 3, 1).numpy()}
    np.savez_compressed(HERE / "cross.npz", **record)


if __name__ == "__main__":
    main()
