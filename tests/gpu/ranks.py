# SPDX-License-Identifier: BSD-3-Clause
"""A layer over several ranks on one GPU, against one rank with the whole batch: the same bits. A program of its own.

NPROC=3 launch/mpirun.sh -m tests.gpu.ranks       MPI through host memory
NPROC=3 launch/torchrun.sh -m tests.gpu.ranks     gloo
"""

import sys

import torch

import syncbn
from syncbn import functional
from syncbn.calls.eager import Call
from syncbn.calls.sites import Layer, Site
from syncbn.moments import Running
from syncbn.transports import launchers
from syncbn.transports.single import SingleTransport
from tests.multiprocess import batches


def main():
    launch = launchers.detect()
    gpus = torch.cuda.device_count()  # none where the tests only try this program out
    device = torch.device("cuda", launch.local_rank % gpus) if gpus else torch.device("cpu")
    if launch.size > 1 and not launch.speaks_mpi:
        torch.distributed.init_process_group("gloo")  # for CUDA tensors too: NCCL refuses two ranks on one GPU
    world = syncbn.init(device=device)
    assert world.size == launch.size, world
    for name, share in batches.SHARES.items():
        sizes = share(world.size)
        start = sum(sizes[: world.rank])
        mine = slice(start, start + sizes[world.rank])
        batch = batches.make((sum(sizes), 7, 9, 6), torch.Generator().manual_seed(0))
        x, grad_y = batch.x.to(device), batch.grad_y.to(device)
        ours = batches.run(batches.ours(batch).to(device), x[mine], grad_y[mine])
        alone = batches.ours(batch).to(device)
        alone_x = x.clone().requires_grad_()
        running = Running(alone.running_mean, alone.running_var, alone.num_batches_tracked, 0.1)
        layer = Layer(Site("SyncBatchNorm", compares=False), alone.settings(), None, alone)
        call = Call(alone_x, None, True, layer, SingleTransport(), running, None, None)
        y = functional.batch_norm(alone_x, None, alone.weight, alone.bias, call)
        y.backward(grad_y)
        same = (
            torch.equal(ours.y, y[mine])
            and torch.equal(ours.grad_x, alone_x.grad[mine])
            and torch.equal(ours.mean, alone.running_mean)
            and torch.equal(ours.var, alone.running_var)
        )
        world.raise_together(None if same else RuntimeError(f"{name}: the bits differ"))
    world.check()
    if world.rank == 0:
        sys.stdout.write(f"{world.size} ranks over {world.transport.name} on {device}: the same bits as one\n")
    if torch.distributed.is_initialized():  # a gloo group that is alive at the end can abort the process
        world.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
