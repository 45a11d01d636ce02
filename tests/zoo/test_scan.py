# SPDX-License-Identifier: BSD-3-Clause
"""Architectures of timm and torchvision convert and revert; all of them: python -m tests.zoo.scan."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import syncbn
from tests.zoo import scan

ENDS = [(library, name) for (library, _), names in scan.architectures().items() for name in {names[0], names[-1]}]
CONVERTED = {"BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "BatchNormAct2d"}


@pytest.mark.parametrize(("library", "name"), sorted(ENDS), ids=str)
def test_an_architecture_converts_and_reverts(library, name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a library about itself
        model = scan.build(library, name)
    assert {cls.__name__ for cls in scan.batch_norms(model)} <= CONVERTED
    assert scan.round_trip(model) == []
