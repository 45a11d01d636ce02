# SPDX-License-Identifier: BSD-3-Clause
"""Connects, says on which addresses its process listens, waits for a file where one is named, then compares bits.

start_program.py [--ddp] [FILE]
"""

import argparse
import json
import os
import socket
import sys
import time
from pathlib import Path

import psutil
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import syncbn
from tests.hosts.train_program import same_bits, say


def listeners():
    found = psutil.Process().net_connections("tcp")
    return sorted([each.laddr.ip, each.laddr.port] for each in found if each.status == psutil.CONN_LISTEN)


def main(words):
    parser = argparse.ArgumentParser()
    parser.add_argument("--ddp", action="store_true")
    parser.add_argument("file", type=Path, nargs="?")
    options = parser.parse_args(words)
    torch.set_num_threads(1)
    try:
        world = syncbn.init(torch_distributed=options.ddp or None)
    except Exception as error:
        say(f"raised on {socket.gethostname()}: {type(error).__name__}: {error}")
        sys.stdout.flush()
        os._exit(1)
    if options.ddp:
        model = DistributedDataParallel(nn.Linear(2, 2))
        model(torch.ones(1, 2)).sum().backward()
        say(f"ddp on {socket.gethostname()}")
    same_bits(world)
    if options.file:
        say(f"listens on {socket.gethostname()}: {json.dumps(listeners())}")
        end = time.monotonic() + 200
        while not options.file.exists() and time.monotonic() < end:
            time.sleep(0.05)
        same_bits(world)
        say("again")
    world.barrier()


if __name__ == "__main__":
    main(sys.argv[1:])
