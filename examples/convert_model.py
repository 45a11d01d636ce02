# SPDX-License-Identifier: BSD-3-Clause
"""Convert a model, train it, save it, load it, and revert it: nothing is lost.

The model has a forward hook, one batch norm used in two places, and a frozen one.

    $ NPROC=2 launch/mpirun.sh examples/convert_model.py
    converted: SyncBatchNorm1d(4, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True)
    the shared layer is still one: True
    the frozen layer is still frozen: True
    the parameters are the same objects: True
    the hook was called in one training step: 2 times
    the file loads with weights_only=True into the plain model: <All keys matched successfully>
    reverted: BatchNorm1d(4, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True)
    same output in eval, bit for bit: True

`python examples/convert_model.py` prints the same.
"""

import io

import torch
from torch import nn

import syncbn


def build():
    """Two branches through one batch norm, and a head whose batch norm is frozen."""
    shared, frozen = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
    frozen.requires_grad_(False)
    branch = nn.Sequential(nn.Linear(3, 4), shared, nn.Tanh(), nn.Linear(4, 4), shared)
    return nn.Sequential(branch, frozen, nn.Linear(4, 1))


def train_step(world, model, x):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(x).square().mean().backward()
    world.average_gradients(model)
    optimizer.step()


def main():
    world = syncbn.init(device="cpu")
    say = print if world.rank == 0 else lambda *_: None
    torch.manual_seed(0)
    model = build()
    shared, frozen = model[0][1], model[1]
    parameters = list(model.parameters())
    calls = []
    shared.register_forward_hook(lambda *_: calls.append(1))

    syncbn.convert_sync_batchnorm(model)  # in place; the result is the model itself
    say(f"converted: {shared}")
    say(f"the shared layer is still one: {model[0][1] is model[0][4]}")
    say(f"the frozen layer is still frozen: {not frozen.weight.requires_grad}")
    same = all(old is new for old, new in zip(parameters, model.parameters(), strict=True))
    say(f"the parameters are the same objects: {same}")

    x = torch.randn(8, 3).tensor_split(world.size)[world.rank]
    train_step(world, model, x)
    say(f"the hook was called in one training step: {len(calls)} times")

    file = io.BytesIO()  # torch.save(model.state_dict(), "model.pt") on rank 0 is the same
    torch.save(model.state_dict(), file)
    file.seek(0)
    plain = build()
    loaded = plain.load_state_dict(torch.load(file, weights_only=True))
    say(f"the file loads with weights_only=True into the plain model: {loaded}")

    synchronised = model.eval()(x)
    syncbn.revert_sync_batchnorm(model)
    say(f"reverted: {shared}")
    outputs = (model(x), plain.eval()(x))
    say(f"same output in eval, bit for bit: {all(torch.equal(synchronised, y) for y in outputs)}")


if __name__ == "__main__":
    main()
