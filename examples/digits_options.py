# SPDX-License-Identifier: BSD-3-Clause
"""The command line of digits.py, and the checks of its files."""

import argparse
import os
from pathlib import Path

import digits_data
import torch
from together import agree, at_least, parse

import syncbn

FIGURES = (".png", ".pdf", ".svg")


def read(world: syncbn.World) -> tuple[argparse.Namespace, digits_data.Data]:
    """Returns the options and the data; ends every rank with code 2 if either is wrong on any."""
    args, data, error = parse(world, _parser()), None, None
    args.batch = args.batch or max(8, 2 * world.size)
    try:
        if args.batch < world.size:
            need = f"an image for each of the {world.size} processes"
            raise ValueError(f"--batch needs {need}; received {args.batch}. Choose at least {world.size}.")
        _check_folder(args.out)
        dtype = getattr(torch, args.dtype)
        data = digits_data.load(args.data, smallest_batch=args.batch, seed=args.seed, dtype=dtype)
    except ValueError as problem:
        error = problem
    agree(world, error)
    args.steps = args.epochs * (len(data.x) // args.batch) if args.epochs else args.steps
    return args, data


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Three ways to train on a batch, compared on real images.")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=at_least(1), default=300, help="steps of each run (default 300)")
    length.add_argument("--epochs", type=at_least(1), help="passes over the images, instead of --steps")
    parser.add_argument(
        "--batch", type=at_least(1), help="images a step, of all processes (default 8, at least 2 each)"
    )
    parser.add_argument("--lr", type=float, default=0.1, help="learning rate (default 0.1)")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of weights, split and order (default 0)")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32", help="default float32")
    parser.add_argument("--data", type=Path, metavar="FILE.npz", help="your images x and classes y, not the digits")
    parser.add_argument("--out", type=Path, default=Path("out/digits.png"), help="the figure (default out/digits.png)")
    parser.add_argument("--json", action="store_true", help="print the results as JSON instead of the table")
    return parser


def _check_folder(figure: Path) -> None:
    """Checks before the training whether the figure can be written."""
    problem = "" if figure.suffix in FIGURES else f"the ending is not one of {', '.join(FIGURES)}"
    try:
        figure.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        problem = error.strerror or str(error)
    if not problem and not os.access(figure.parent, os.W_OK):
        problem = "the folder is read-only"
    if problem:
        raise ValueError(f"--out needs a figure's name in a folder to write to; received {figure}: {problem}.")
