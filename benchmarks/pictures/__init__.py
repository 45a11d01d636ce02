# SPDX-License-Identifier: BSD-3-Clause
"""The pictures of the documentation, as SVG for light and for dark pages.

    python -m benchmarks.pictures             all of them, into docs/pictures: some seconds, no measurement
    python -m benchmarks.pictures wire digits  some of them

__main__.py    the command
svg.py         a canvas, an axis, the colours of both themes
data_flow.py   what is sent                                    drawn from the package's own sizes
small_batch.py what batch norm makes of a small batch          computed
variance.py    error of the variance against mean / std        computed
digits.py      the curves of the demo                          results/digits.json
masks.py       what examples/segmentation.py makes of pictures results/segmentation.json, by segment.py
bench.py       the layer by shape, layout and launcher         results/bench-*.json
transports.py  an all-reduce by length, ranks and transport    results/transports-*.json

results/ holds what was measured, each with the command in COMMANDS of __main__.py.
"""
