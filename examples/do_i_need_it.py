# SPDX-License-Identifier: BSD-3-Clause
"""Do I need synchronised statistics, in which layers, and what do they cost? Two networks are asked, then trained.

`syncbn.drift` watches 20 steps of the digits network (two images a process) and of the U-Net of segmentation.py (one
picture a process), as they are and synchronised. Then each is trained with no layer synchronised, with all, and with
those that the report of the synchronised one recommends. After the reports it prints, for digits and U-Net:

    $ NPROC=2 launch/mpirun.sh examples/do_i_need_it.py
    | synchronised   |   layers |   accuracy |   s / step |
    |----------------|----------|------------|------------|
    | none           |        0 |      0.943 |     0.0073 |
    | all            |        6 |      0.975 |     0.0117 |
    | recommended    |        3 |      0.968 |     0.0095 |
    | synchronised   |   layers |   IoU dark |   IoU bright |   s / step |
    |----------------|----------|------------|--------------|------------|
    | none           |        0 |      0.456 |        0.010 |     0.0173 |
    | all            |       10 |      0.950 |        0.984 |     0.0202 |
    | recommended    |        9 |      0.540 |        0.003 |     0.0212 |

Also `NPROC=2 launch/torchrun.sh examples/do_i_need_it.py`, and any other number of processes. `--others` trains with
group norm and layer norm, too; `--seeds 5` averages over five trainings. The figure of each network shows drift by
depth, what independent samples have, and the time of the collectives.
"""

import argparse
import contextlib
import itertools
import time
from pathlib import Path
from statistics import mean, median

import digits_data
import digits_model
import segmentation
import torch
from tabulate import tabulate
from together import at_least, parse
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

import syncbn

WATCHED = 20  # steps


class Digits:
    """The residual network of digits.py, two images a process."""

    name, quality, each, steps, lr, momentum = "digits", ("accuracy",), 2, 300, 0.1, 0.0

    def __init__(self):
        data = digits_data.load(None, smallest_batch=2, seed=0)
        self.x, self.y, self.test_x, self.test_y = data[:4]

    def build(self, seed):  # noqa: D102
        return digits_model.build(1, 10, seed=seed, dtype=torch.float32)

    def judge(self, model):  # noqa: D102
        model.eval()
        with torch.no_grad():
            return [(model(self.test_x).argmax(1) == self.test_y).double().mean().item()]


class Segmentation:
    """The U-Net of segmentation.py, one picture a process."""

    name, quality, each, steps, lr, momentum = "unet", ("IoU dark", "IoU bright"), 1, 600, 0.02, 0.9

    def __init__(self):
        self.x, self.y = segmentation.pictures(400, seed=1)
        self.test_x, self.test_y = segmentation.pictures(60, seed=2)

    def build(self, seed):  # noqa: D102
        torch.manual_seed(seed)
        return segmentation.UNet()

    def judge(self, model):  # noqa: D102
        return segmentation.overlap(segmentation.predict(model, self.test_x), self.test_y)


def train(world, task, model, arm, steps, seed, *, watch=False):
    """Trains a model. Returns its quality, averaged over the ranks, the seconds of a step, and the report."""
    optimizer = torch.optim.SGD(model.parameters(), task.lr, task.momentum)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
    order, seconds, report = torch.Generator().manual_seed(seed), [], None  # the same order on every rank
    with contextlib.ExitStack() as watching:
        for step in tqdm(range(steps), f"{task.name}, {arm}", leave=False, ncols=79, disable=world.rank > 0):
            if watch and step == 0:
                report = watching.enter_context(syncbn.drift(model))
            if step == WATCHED:
                watching.close()
            began = time.perf_counter()
            batch = torch.randint(len(task.x), (world.size, task.each), generator=order)[world.rank]
            optimizer.zero_grad()
            F.cross_entropy(model(task.x[batch]), task.y[batch]).backward()
            world.average_gradients(model)
            optimizer.step()
            decay.step()
            seconds += [time.perf_counter() - began] if step >= WATCHED or not watch else []
    qualities = [world.average(quality, 1.0) for quality in task.judge(model)]  # without sync each rank has its own
    return qualities, median(seconds or [0.0]), report


def with_norm(model, make):
    """Puts another norm in the place of every batch norm."""
    for parent in list(model.modules()):
        for name, layer in parent.named_children():
            if isinstance(layer, nn.BatchNorm2d):
                setattr(parent, name, make(layer.num_features))
    return model


def study(world, task, args):
    """Prints the report of a network and the table of its trainings, and draws its figure."""
    names = []  # what the report of the synchronised network recommends
    arms = {
        "none": lambda model: model,
        "all": syncbn.convert_sync_batchnorm,
        "recommended": lambda model: syncbn.convert_sync_batchnorm(model, only=names),
        "group norm, 8 groups": lambda model: with_norm(model, lambda C: nn.GroupNorm(8, C)),
        "layer norm": lambda model: with_norm(model, lambda C: nn.GroupNorm(1, C)),
    }
    arms = dict(itertools.islice(arms.items(), None if args.others else 3))
    found, reports, path = {arm: [] for arm in arms}, {}, args.out / f"drift-{task.name}"
    for seed, arm in itertools.product(range(args.seeds), arms):
        watch, model = seed == 0 and arm in ("none", "all"), arms[arm](task.build(seed))
        qualities, seconds, report = train(world, task, model, arm, args.steps or task.steps, seed, watch=watch)
        found[arm].append([*qualities, seconds])
        reports[arm] = report or reports.get(arm)
        names = names or (reports["all"].recommend(args.share) if arm == "all" else [])
    themes = {"-light": False, "-dark": True} if args.format == "svg" else {"": args.dark}
    figures = {Path(f"{path}{name}.{args.format}"): dark for name, dark in themes.items()}
    for figure, dark in figures.items():
        reports["all"].figure(figure, dark=dark)  # with the time of the collectives
    reports["all"].to_json(path.with_suffix(".json"))
    if world.rank == 0:
        print(f"{task.name}, not synchronised\n{reports['none']}\n\n{task.name}, synchronised\n{reports['all']}\n")
        layers = {"none": 0, "recommended": len(names), "all": len(reports["all"].rows)}
        rows = [[arm, layers.get(arm, "-"), *map(mean, zip(*runs, strict=True))] for arm, runs in found.items()]
        headers = ["synchronised", "layers", *task.quality, "s / step"]
        print(tabulate(rows, headers, floatfmt=("", "", *[".3f"] * len(task.quality), ".4f"), tablefmt="github"))
        print(f"figure: {', '.join(map(str, figures))}\n")


def main():
    world = syncbn.init(device="cpu")
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description="Which layers of two networks need synchronised statistics.")
    parser.add_argument("--network", choices=("digits", "unet", "both"), default="both", help="default both")
    parser.add_argument("--steps", type=at_least(1), help="of each training (default 300 and 600)")
    parser.add_argument("--share", type=float, default=0.9, help="of the excess drift to remove (default 0.9)")
    parser.add_argument("--seeds", type=at_least(1), default=1, help="trainings to average over (default 1)")
    parser.add_argument("--others", action="store_true", help="train with group norm and layer norm, too")
    parser.add_argument("--out", type=Path, default=Path("out"), help="the folder of the figures (default out)")
    parser.add_argument(
        "--format", choices=("png", "svg", "pdf"), default="png", help="default png; svg draws two, light and dark"
    )
    parser.add_argument("--dark", action="store_true", help="draw for a dark background")
    args = parse(world, parser)
    args.out.mkdir(parents=True, exist_ok=True)
    for task in (Digits, Segmentation):
        if args.network in (task.name, "both"):
            study(world, task(), args)


if __name__ == "__main__":
    main()
