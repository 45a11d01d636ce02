# SPDX-License-Identifier: BSD-3-Clause
"""A generative network with gradient penalty and batch norm in its critic, on scikit-learn's digits, over processes.

The penalty differentiates the critic's slope, so its batch norm is differentiated twice, across all processes. Every
process checks its critic against training on the whole batch in one process.

    $ NPROC=2 launch/mpirun.sh examples/wgan_gp.py
    step    1: critic loss    6.42, wrong by less than 1e-12
    step  200: critic loss  -24.58
    step  400: critic loss  -29.02
    step  600: critic loss  -12.70
    samples: out/wgan_gp.png

`python examples/wgan_gp.py` starts with the same loss; later ones drift apart, as a game amplifies rounding.
Source: Gulrajani et al. 2017 (arXiv 1704.00028), who leave batch norm out of the critic: with it the penalty is that of
the batch, not of each sample alone. Here it shows that it can be done.
"""

import argparse
import copy
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from together import agree, at_least, parse
from torch import nn

import syncbn

LATENT, PENALTY, CRITIC_STEPS = 16, 10.0, 2
ROUNDING = 1e-12  # float64


def build():
    """Generator and critic with batch norms of one process."""
    torch.manual_seed(0)
    generator = [nn.Linear(LATENT, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 64), nn.Tanh()]
    critic = [nn.Linear(64, 128), nn.SiLU(), nn.Linear(128, 64), nn.BatchNorm1d(64), nn.SiLU(), nn.Linear(64, 1)]
    return nn.Sequential(*generator), nn.Sequential(*critic)


def critic_loss(critic, real, fake, mix, total):
    """The local batch's part of the loss. The parts add up to the loss of the whole batch of ``total``."""
    between = (mix * real + (1 - mix) * fake).requires_grad_()
    (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    penalty = (slope.square().sum(1).add(1e-12).sqrt() - 1).square().sum()
    of_fake, of_real = critic(torch.cat((fake, real))).chunk(
        2
    )  # one batch: each alone would be normalised to look alike
    return (of_fake.sum() - of_real.sum() + PENALTY * penalty) / total


def gradients_agree(world, critic, plain, batch, mine):
    """Whether the average of the ranks' gradients is that of the plain critic on the whole batch."""
    critic_loss(plain, *batch, len(batch[0])).backward()
    (critic_loss(critic, *(part[mine] for part in batch), len(batch[0])) * world.size).backward()
    world.average_gradients(critic)
    pairs = zip(critic.parameters(), plain.parameters(), strict=True)
    return all((p.grad - q.grad).abs().max() < ROUNDING for p, q in pairs)


def train(world, args, images):
    generator, plain = build()
    critic = syncbn.convert_sync_batchnorm(copy.deepcopy(plain))
    syncbn.convert_sync_batchnorm(generator)
    rng = torch.Generator().manual_seed(1)  # the same numbers on every process, which takes a part
    mine = slice(args.batch * world.rank // world.size, args.batch * (world.rank + 1) // world.size)
    of_generator, of_critic = (torch.optim.Adam(m.parameters(), 2e-3, (0.5, 0.9)) for m in (generator, critic))

    for step in range(1, args.steps + 1):
        for repeat in range(CRITIC_STEPS):
            real = images[torch.randint(len(images), (args.batch,), generator=rng)]
            noise, mix = torch.randn(args.batch, LATENT, generator=rng), torch.rand(args.batch, 1, generator=rng)
            with torch.no_grad():
                fake = generator(noise[mine])
            if step == 1 and repeat == 0:
                whole = torch.zeros_like(real)
                whole[mine] = fake
                batch = (real, world.transport.all_reduce(whole), mix)
                same = gradients_agree(world, critic, plain, batch, mine)
                agree(world, None if same else RuntimeError("The critic's gradient is not that of one process."))
            of_critic.zero_grad()
            loss = critic_loss(critic, real[mine], fake, mix[mine], args.batch)
            (loss * world.size).backward()
            world.average_gradients(critic)
            of_critic.step()
        of_generator.zero_grad()
        scores = critic(torch.cat((generator(noise[mine]), real[mine])))
        (-scores[: len(noise[mine])].sum() * world.size / args.batch).backward()
        world.average_gradients(generator)
        of_generator.step()
        if step == 1 or step % 200 == 0:
            value = world.transport.all_reduce(loss.detach().clone()).item()
            checked = f", wrong by less than {ROUNDING:.0e}" if step == 1 else ""
            if world.rank == 0:
                print(f"step {step:4d}: critic loss {value:7.2f}{checked}", flush=True)
    return generator


def draw(generator, path):
    """Writes a picture of 40 samples."""
    from matplotlib.image import imsave

    path.parent.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        samples = generator.eval()(torch.randn(40, LATENT, generator=torch.Generator().manual_seed(2)))
    rows = samples.view(4, 10, 8, 8).transpose(1, 2).reshape(32, 80)
    imsave(path, rows.repeat_interleave(8, 0).repeat_interleave(8, 1).numpy(), cmap="gray")
    print(f"samples: {path}")


def main():
    world = syncbn.init(device="cpu")
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=at_least(1), default=600)
    parser.add_argument("--batch", type=at_least(2), default=64, help="images a step, of all processes")
    parser.add_argument("--out", type=Path, default=Path("out/wgan_gp.png"))
    args = parse(world, parser)
    images = torch.from_numpy(load_digits().data).double() / 8 - 1
    generator = train(world, args, images)
    if world.rank == 0:
        draw(generator, args.out)


if __name__ == "__main__":
    main()
