# SPDX-License-Identifier: BSD-3-Clause
"""Where a rank that refuses its input joins the others."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from syncbn import checks


@pytest.mark.parametrize(
    ("x", "layer", "expected"),
    [
        ("cpu", ("cpu", "cpu"), "cpu"),
        ("cuda:1", ("cuda:1", "cuda:1"), "cuda:1"),
        ("cpu", ("cuda:1", "cuda:1"), "cuda:1"),  # left on the CPU
        ("cuda:0", ("cuda:1", "cuda:1"), "cuda:1"),  # on the GPU of another rank
        ("meta", ("cuda:1", None), "cuda:1"),
        (None, ("cuda:1", "cuda:1"), "cuda:1"),  # no tensor
        ("cpu", ("cuda:1", None), "cuda:1"),  # a tie
        ("cuda:1", ("cpu", "cpu"), "cpu"),  # the layer was not moved
        ("cuda:1", (None, None), "cuda:1"),
        (None, (None, None), "cpu"),
    ],
)
def test_a_refused_call_joins_on_the_device_of_its_layer(x, layer, expected):
    with FakeTensorMode():  # CUDA tensors without a GPU
        x, *layer = (None if place is None else torch.empty(3, device=place) for place in (x, *layer))
        assert checks.device(x, *layer) == torch.device(expected)
        assert checks.device_type(x, *layer) == torch.device(expected).type
        usable = x is not None and not x.is_meta
        error = checks.device_error(x, *layer) if usable else None
        kind, same = checks.place(x, *layer)
        assert (kind, str(same)) == (torch.device(expected).type, str(error))
