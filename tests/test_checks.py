# SPDX-License-Identifier: BSD-3-Clause
"""What is checked before the ranks speak, and where and how wide a rank that refuses its input joins the others."""

import re

import pytest
import torch
from torch._subclasses import FakeTensorMode

from syncbn.checks import inputs, placement


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
        assert placement.device(x, *layer) == torch.device(expected)
        assert placement.device_type(x, *layer) == torch.device(expected).type
        usable = x is not None and not x.is_meta
        error = placement.device_error(x, *layer) if usable else inputs.input_error(x, None)
        place, same = placement.place(x, *layer)
        assert (place, str(same)) == (torch.device(expected), str(error))


@pytest.mark.parametrize(
    ("parameters", "x", "expected"),
    [
        ((3, 3, None, None), 3, 3),
        ((3, 3, 3, 3), 5, 3),
        ((3, 4, 4, None), 5, 4),
        ((3, 4, None, None), 5, 3),  # a tie: the first
        ((3, None, None, None), 5, 3),  # a tie: a parameter before x
        ((3, None, None, None), None, 3),
        ((None, None, None, None), 5, 5),
        ((None, None, None, None), None, 1),
    ],
)
def test_a_refused_call_is_as_wide_as_most_of_its_tensors(parameters, x, expected):
    names = ("weight", "bias", "running_mean", "running_var")
    tensors = {n: None if C is None else torch.ones(C) for n, C in zip(names, parameters, strict=True)}
    for given in [torch.ones(2, x), torch.ones(2, x, 4)] if x else [None, torch.ones(2), "text"]:
        assert inputs.most_common_width(tensors, given) == expected


@pytest.mark.parametrize(
    ("parameter", "message"),
    [
        (torch.ones(2), r"needs bias of shape \(3,\) and a floating dtype; received shape \(2,\), float32"),
        (torch.ones(3, 1), r"needs bias of shape \(3,\) and a floating dtype; received shape \(3, 1\), float32"),
        (torch.ones(3, dtype=torch.int64), r"received shape \(3,\), int64. Make it with torch.ones\(3\)"),
        (torch.ones(3, device="meta"), "needs bias on the device of the input, .*; received meta. Move it there"),
    ],
    ids=["width", "dims", "dtype", "device"],
)
def test_a_parameter_that_does_not_fit_is_named(parameter, message):
    x = torch.ones(4, 3)
    assert inputs.parameter_error({"weight": torch.ones(3), "bias": torch.ones(3), "running_mean": None}, x, 3) is None
    error = inputs.parameter_error({"weight": torch.ones(3), "bias": parameter}, x, 3)
    assert isinstance(error, ValueError)
    assert re.search(message, str(error))


def test_input_mask_and_eps_are_checked_in_one_call():
    x, mask = torch.ones(4, 3), torch.ones(4)
    assert inputs.call_error(x, None, 3, 1e-5) is None
    assert inputs.call_error(x, mask, 3, 1e-5) is None
    assert "eps > 0" in str(inputs.call_error(x, mask, 3, 0.0))
    assert "num_features=5" in str(inputs.call_error(x, mask, 5, 1e-5))
    assert "mask.shape" in str(inputs.call_error(x, torch.ones(3), 3, 1e-5))
    assert "input.dim() >= 2" in str(inputs.call_error(mask, mask, 3, 1e-5))  # the mask waits for a right input
