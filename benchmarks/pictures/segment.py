# SPDX-License-Identifier: BSD-3-Clause
"""Trains the two networks of examples/segmentation.py and prints what they make of four pictures, as JSON.

    $ NPROC=2 launch/mpirun.sh benchmarks/pictures/segment.py > benchmarks/pictures/results/segmentation.json

Classes of pixels are rows of digits: 0 background, 1 dark, 2 bright. Gray values are bytes, from -1 to 3.
"""

import json
import sys
from argparse import Namespace
from pathlib import Path

import torch

import syncbn

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import segmentation

STEPS, PICTURES = 600, 2
"""As the example has it, and pictures of each material."""


def rows(classes):
    """A line of digits for each row of pixels."""
    return ["".join(map(str, row)) for row in classes.tolist()]


def main():
    world = syncbn.init(device="cpu")
    torch.set_num_threads(1)
    options = Namespace(steps=STEPS, lr=0.02, seed=0)
    x, y = segmentation.pictures(60, seed=2)
    columns, quality = {"truth": y}, {}
    for name in ("BatchNorm2d", "SyncBatchNorm"):
        torch.manual_seed(options.seed)
        model = segmentation.UNet()
        if name == "SyncBatchNorm":
            syncbn.convert_sync_batchnorm(model)
        segmentation.train(world, model, options)
        columns[name] = segmentation.predict(model, x)
        quality[name] = dict(zip(segmentation.KINDS, segmentation.overlap(columns[name], y), strict=True))
    if world.rank > 0:  # rank 0 prints what its model says
        return
    kinds = y.flatten(1).amax(1)
    chosen = [i for kind in (1, 2) for i in (kinds == kind).nonzero()[:PICTURES, 0].tolist()]
    gray = ((x[chosen, 0] + 1) / 4 * 255).clamp(0, 255).round().to(torch.uint8)
    document = {
        "setting": {"processes": world.size, "launcher": world.launcher, "steps": STEPS, "torch": torch.__version__},
        "IoU": quality,
        "pictures": [bytes(picture.flatten().tolist()).hex() for picture in gray],
        "classes": {name: [rows(classes[i]) for i in chosen] for name, classes in columns.items()},
    }
    print(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
