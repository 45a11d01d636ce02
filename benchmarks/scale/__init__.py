# SPDX-License-Identifier: BSD-3-Clause
"""What synchronising costs at thousands of ranks, simulated: `python -m benchmarks.scale`, or `make scale`.

wires.py      what a step of ResNet-50 sends, taken from the code of syncbn and of torch
replay.c      the collectives, as MPI programs for SimGrid's SMPI; collectives.c has the algorithms
platforms/    the simulated machines
simulate.py   builds and runs replay.c
waiting.py    how long ranks wait for the slowest, by Monte Carlo
results.py    the CSV files, and what follows from them
plot.py       the pictures of docs/clusters/scale.md
tables.py     its tables
"""
