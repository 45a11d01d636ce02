# SPDX-License-Identifier: BSD-3-Clause
"""A summary reads the code of a forward: what calls a batch norm function is local."""

import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.functional import batch_norm as imported_batch_norm

from syncbn import summary
from tests.convert.norms import Calls, CallsOurs, LayerOfThatName, StandardizesItsWeight, only


class Inherits(Calls):
    pass


class CallsSuper(Calls):
    def forward(self, x):
        return super().forward(x).relu()


class CallsByImportedName(nn.Module):
    def forward(self, x):
        return imported_batch_norm(x, None, None, training=self.training)


class CallsByLocalImport(nn.Module):
    def forward(self, x):
        import torch.nn.functional as local

        return local.batch_norm(x, None, None, training=self.training)


class CallsInNested(nn.Module):
    def forward(self, x):
        def inner():
            return F.batch_norm(x, None, None, training=True)

        return inner()


def helper(x):
    return torch.batch_norm(x, None, None, None, None, True, 0.1, 1e-5, False)


class CallsHelper(nn.Module):
    def forward(self, x):
        return self.normalise(x)

    def normalise(self, x):
        return helper(x)


class CallsDecorated(nn.Module):
    @torch.no_grad()
    def forward(self, x):
        return torch.ops.aten.batch_norm(x, None, None, None, None, True, 0.1, 1e-5, False)


class CallsHeldFunction(nn.Module):
    def __init__(self):
        super().__init__()
        self.function = functools.partial(F.batch_norm, training=True)

    def forward(self, x):
        return self.function(x, None, None)


class OverridesWithoutSuper(Calls):
    def forward(self, x):
        return x.relu()


class UsesGivenStatistics(nn.Module):
    """The way of PyG's BatchNorm for a single element."""

    def forward(self, x, mean, var):
        x = F.batch_norm(x.reshape(2, -1), mean, var, None, None, False, 0.0, len(x.shape))
        return F.batch_norm(x, mean, running_var=var, training=False) + F.batch_norm(x, mean, var)


@pytest.mark.parametrize(
    ("cls", "function"),
    [
        (Calls, "F.batch_norm"),
        (Inherits, "F.batch_norm"),
        (CallsSuper, "F.batch_norm"),
        (CallsByImportedName, "F.batch_norm"),
        (CallsByLocalImport, "F.batch_norm"),
        (CallsInNested, "F.batch_norm"),
        (CallsHelper, "torch.batch_norm"),
        (CallsDecorated, "aten.batch_norm"),
        (CallsHeldFunction, "F.batch_norm"),
    ],
)
def test_a_forward_that_calls_a_batch_norm_function_is_local(cls, function):
    row = only(cls())
    assert (row.kind, row.channels, row.synchronised, row.local) == (cls.__name__, None, False, True)
    assert row.reason.startswith(f"its forward calls {function};")


def test_a_forward_replaced_on_the_instance_is_read():
    layer = nn.Identity()
    layer.forward = lambda x: F.batch_norm(x, None, None, training=True)
    assert only(layer).local


@pytest.mark.parametrize(
    "module",
    [OverridesWithoutSuper(), StandardizesItsWeight(2, 3, 1), UsesGivenStatistics()],
    ids=lambda module: type(module).__name__,
)
def test_no_false_alarm(module):
    assert summary(module).rows == []


def test_a_submodule_with_the_name_of_the_function_is_no_call_of_it():
    assert only(LayerOfThatName()).name == "batch_norm"


def test_a_forward_that_calls_ours_is_synchronised():
    row = only(CallsOurs())
    assert (row.synchronised, row.local) == (True, False)
