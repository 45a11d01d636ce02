# SPDX-License-Identifier: BSD-3-Clause
"""Architectures of timm and torchvision convert and revert; all of them: python -m tests.zoo.scan."""

import pytest
from timm.layers import BatchNormAct2d
from torch import nn

from tests.zoo import scan

# All of them take minutes. Of a file of timm that names no batch norm, none has one.
FILES = [
    (library, names[0])
    for (library, file), names in scan.architectures().items()
    if library == "torchvision" or scan.names_batch_norm(file)
]
CONVERTED = {nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, BatchNormAct2d}


@pytest.mark.filterwarnings("ignore")  # of libraries, about themselves
@pytest.mark.parametrize(("library", "name"), FILES, ids=str)
def test_an_architecture_converts_and_reverts(library, name):
    model = scan.build(library, name)
    assert scan.batch_norms(model) <= CONVERTED
    assert scan.round_trip(model) == []
