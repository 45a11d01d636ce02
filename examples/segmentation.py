# SPDX-License-Identifier: BSD-3-Clause
"""A small U-Net that sees one picture per process: two materials of one shape and texture, one twice as bright.

Normalised by its own statistics alone, a picture of the bright material looks like one of the dark: BatchNorm2d
cannot tell them apart. Over the pictures of both processes SyncBatchNorm can. The quality is measured in eval mode,
on 60 pictures that were not trained on: intersection over union, for each material.

    $ NPROC=2 launch/mpirun.sh examples/segmentation.py
    | arm           |   dark |   bright |
    |---------------|--------|----------|
    | BatchNorm2d   |   0.51 |     0.01 |
    | SyncBatchNorm |   0.95 |     0.98 |
    Intersection over union after 600 steps of 2 pictures, one a process
    figure: out/segmentation.png

Also `NPROC=2 launch/torchrun.sh examples/segmentation.py`, and any other number of processes. The figure shows
pictures, truth, and what either network makes of them.
"""

import argparse
from pathlib import Path

import torch
from tabulate import tabulate
from together import at_least, parse
from torch import nn
from torch.nn import functional as F

import syncbn

SIDE, KINDS = 48, ("dark", "bright")
COLOURS = ("#ffffff", "#0072b2", "#d55e00")  # of the background and the materials


def draw(rng):
    """One picture of discs and squares of one material, and the class of every pixel."""
    row, column = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    kind = int(torch.randint(1, 3, (), generator=rng))
    shapes = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    for _ in range(int(torch.randint(2, 6, (), generator=rng))):
        radius, disc = int(torch.randint(4, 11, (), generator=rng)), bool(torch.randint(2, (), generator=rng))
        y, x = torch.randint(radius, SIDE - radius + 1, (2,), generator=rng).tolist()
        dy, dx = (row - y).abs(), (column - x).abs()
        shapes |= dy**2 + dx**2 <= radius**2 if disc else torch.maximum(dy, dx) <= 0.87 * radius
    noise = 0.3 * torch.randn(SIDE, SIDE, generator=rng)
    return kind * (shapes + noise), kind * shapes


def pictures(count, seed):
    rng = torch.Generator().manual_seed(seed)
    images, classes = zip(*(draw(rng) for _ in range(count)), strict=True)
    return torch.stack(images)[:, None], torch.stack(classes)


def block(channels_in, channels):
    layers = []
    for before in (channels_in, channels):
        layers += [nn.Conv2d(before, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """Three scales; on the way up each one sees again what it saw on the way down."""

    def __init__(self, width=8):
        super().__init__()
        self.down = nn.ModuleList([block(1, width), block(width, 2 * width), block(2 * width, 4 * width)])
        self.up = nn.ModuleList([block(6 * width, 2 * width), block(3 * width, width)])
        self.head = nn.Conv2d(width, 1 + len(KINDS), 1)

    def forward(self, x):
        """Returns a score for each class and pixel; the sides of x are multiples of 4."""
        seen = [self.down[0](x)]
        for step in self.down[1:]:
            seen.append(step(F.max_pool2d(seen[-1], 2)))
        x = seen.pop()
        for step in self.up:
            x = step(torch.cat((F.interpolate(x, scale_factor=2.0), seen.pop()), 1))
        return self.head(x)


def train(world, model, args):
    """Trains on one picture per process and step."""
    x, y = pictures(400, seed=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, args.steps)
    order = torch.Generator().manual_seed(args.seed)  # the same on every rank
    for _ in range(args.steps):
        mine = torch.randint(len(x), (world.size,), generator=order)[world.rank :][:1]
        optimizer.zero_grad()
        F.cross_entropy(model(x[mine]), y[mine]).backward()
        world.average_gradients(model)
        optimizer.step()
        decay.step()


def predict(model, x):
    model.eval()  # running statistics, and no communication
    with torch.no_grad():
        return torch.cat([model(part).argmax(1) for part in x.split(20)])


def overlap(predicted, y):
    """Intersection over union of each material."""
    pairs = [(predicted == kind, y == kind) for kind in range(1, len(KINDS) + 1)]
    return [((p & t).sum() / (p | t).sum()).item() for p, t in pairs]


def figure(path, x, columns):
    """A row for each picture: the picture, and what the columns say about its pixels."""
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure  # without pyplot, which may look for a display

    drawn = Figure(figsize=(9, 9), dpi=100, layout="constrained")
    chosen = [i for kind in (1, 2) for i in (columns["truth"].flatten(1).amax(1) == kind).nonzero()[:2, 0].tolist()]
    for i, row in zip(chosen, drawn.subplots(4, 1 + len(columns)), strict=True):
        row[0].imshow(x[i, 0], cmap="gray", vmin=-1, vmax=3)
        for axes, (name, classes) in zip(row, [("picture", None), *columns.items()], strict=True):
            axes.set_axis_off()
            if classes is not None:
                axes.imshow(classes[i], cmap=ListedColormap(COLOURS), vmin=0, vmax=2)
            if i == chosen[0]:
                axes.set_title(name, fontsize=14)
    drawn.suptitle("White background, blue dark, orange bright material", fontsize=13)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path)


def main():
    world = syncbn.init(device="cpu")
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description="A U-Net on one picture per process, synchronised and not.")
    parser.add_argument("--steps", type=at_least(1), default=600, help="default 600")
    parser.add_argument("--lr", type=float, default=0.02, help="default 0.02")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of weights and order, default 0")
    parser.add_argument("--out", type=Path, default=Path("out/segmentation.png"), help="default out/segmentation.png")
    args = parse(world, parser)

    x, y = pictures(60, seed=2)
    columns, rows = {"truth": y}, []
    for name in ("BatchNorm2d", "SyncBatchNorm"):
        torch.manual_seed(args.seed)
        model = UNet()
        if name == "SyncBatchNorm":
            syncbn.convert_sync_batchnorm(model)
        train(world, model, args)
        columns[name] = predict(model, x)
        rows.append([name, *overlap(columns[name], y)])
    if world.rank == 0:  # its model: without synchronisation the running statistics differ from rank to rank
        print(tabulate(rows, ["arm", *KINDS], floatfmt=("", ".2f", ".2f"), tablefmt="github"))
        print(f"Intersection over union after {args.steps} steps of {world.size} pictures, one a process")
        figure(args.out, x, columns)
        print(f"figure: {args.out}")


if __name__ == "__main__":
    main()
