# SPDX-License-Identifier: BSD-3-Clause
"""Train a network of timm on real images, 2 images a process, in three ways.

MobileNetV3 has timm's BatchNormAct2d, a batch norm that also applies the activation. syncbn.convert_sync_batchnorm
converts it as it does torch's layers. The same weights, images, order and SGD each time, in float64, since few images
amplify rounding:

    one process    rank 0 computes the whole batch with timm's layers; the others sleep in a barrier
    local          each process normalises its own 2 images; gradients are averaged
    SyncBatchNorm  the same, after the conversion

    $ NPROC=2 launch/mpirun.sh examples/finetune_timm.py
    | arm           |   loss |   test accuracy |   difference, step 5 |
    |---------------|--------|-----------------|----------------------|
    | one process   |   0.98 |            0.72 |              0.0e+00 |
    | local         |   1.39 |            0.62 |              3.8e-01 |
    | SyncBatchNorm |   0.85 |            0.83 |              5.6e-12 |
    mobilenetv3_small_050 after 150 steps of 4 images, 2 a process

The difference is the largest of any parameter to the run of one process. Each step of so few images amplifies it, so
that after 150 steps one process and SyncBatchNorm are two runs of one kind, with a different end.

Needs `pip install "syncbn[mpi,examples,zoo]"`. Your own: `--model NAME` of timm, and `--pretrained`, for which timm
loads weights from its hub.
"""

import argparse
import copy

import digits_data
import torch
from tabulate import tabulate
from together import agree, at_least, parse
from torch.nn import functional as F
from tqdm import tqdm

import syncbn

EACH = 2  # images a process
COMPARE_AT = 5


def build(args, classes):
    """The network, for images of one channel."""
    try:
        import timm
    except ImportError as error:
        need = f'examples/finetune_timm.py needs timm; importing it failed: {error}. pip install "syncbn[zoo]"'
        raise RuntimeError(need) from None
    torch.manual_seed(args.seed)
    return timm.create_model(args.model, pretrained=args.pretrained, in_chans=1, num_classes=classes).double()


def enlarge(x):
    return F.interpolate(x, size=(64, 64), mode="bilinear")  # the network halves the sides five times


def train(world, name, model, data, args, *, alone=False):
    """Trains on the local batch or, if ``alone``, on the whole batch.

    Returns the parameters after step ``COMPARE_AT``, and the mean loss over the last tenth of the steps.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9)
    order, batch = torch.Generator().manual_seed(args.seed), EACH * world.size
    losses, early = [], None
    for step in tqdm(range(1, args.steps + 1), name, ncols=79, disable=world.rank > 0):
        chosen = torch.randint(len(data.x), (batch,), generator=order)  # the same on every rank
        mine = chosen if alone else chosen[world.rank * EACH :][:EACH]
        optimizer.zero_grad()
        loss = F.cross_entropy(model(enlarge(data.x[mine])), data.y[mine])
        loss.backward()
        if not alone:
            world.average_gradients(model)
        optimizer.step()
        losses.append(loss.detach())
        if step == min(COMPARE_AT, args.steps):
            early = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    return early, torch.stack(losses[-max(args.steps // 10, 1) :]).mean()


def accuracy(model, data):
    model.eval()  # no communication, so that rank 0 may call it alone
    with torch.no_grad():
        predicted = torch.cat([model(enlarge(part)).argmax(1) for part in data.test_x.split(100)])
    return (predicted == data.test_y).double().mean().item()


def main():
    world = syncbn.init(device="cpu")
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description="A network of timm on 2 images a process, synchronised and not.")
    parser.add_argument("--model", default="mobilenetv3_small_050", help="of timm (default mobilenetv3_small_050)")
    parser.add_argument("--pretrained", action="store_true", help="start from weights of timm's hub")
    parser.add_argument("--steps", type=at_least(1), default=150, help="default 150")
    parser.add_argument("--lr", type=float, default=0.01, help="default 0.01")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of weights and order, default 0")
    args, model, error = parse(world, parser), None, None
    data = digits_data.load(None, smallest_batch=EACH * world.size, seed=args.seed, dtype=torch.float64)
    try:
        model = build(args, data.classes)
    except RuntimeError as problem:
        error = problem
    agree(world, error)
    world.broadcast(model)

    rows, reference = [], None
    for name in ("one process", "local", "SyncBatchNorm"):
        alone, own = name == "one process", copy.deepcopy(model)
        if name == "SyncBatchNorm":
            syncbn.convert_sync_batchnorm(own)
        if world.rank == 0 or not alone:
            early, loss = train(world, name, own, data, args, alone=alone)
        world.barrier()
        if world.rank == 0:
            reference = early if reference is None else reference
            rows.append([name, loss.item(), accuracy(own, data), (early - reference).abs().max().item()])
    if world.rank == 0:
        headers = ["arm", "loss", "test accuracy", f"difference, step {min(COMPARE_AT, args.steps)}"]
        print(tabulate(rows, headers, floatfmt=("", ".2f", ".2f", ".1e"), tablefmt="github"))
        print(f"{args.model} after {args.steps} steps of {EACH * world.size} images, {EACH} a process")


if __name__ == "__main__":
    main()
