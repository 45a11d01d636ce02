# SPDX-License-Identifier: BSD-3-Clause
"""Wrong arguments of the public functions and classes: each is an error of ours that names what came and what to do.

What only some ranks may get wrong, and all must raise, is in tests/multiprocess/test_wrong_arguments.py.
"""

import numpy as np
import pytest
import torch
from torch import nn

import syncbn
from syncbn.functional import sync_batch_norm

X = torch.arange(12.0).reshape(2, 3, 2)
OTHERWISE = "otherwise= needs a batch norm class of torch"
PAIR = "renorm_limits needs a pair of numbers, r_max >= 1 and d_max >= 0, or None for batch normalization; received "
WIDTHS = "needs input.size(1) values in each parameter and running statistic; received "


def model():
    return syncbn.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(3)))


class Sub(syncbn.SyncBatchNorm):
    """A class of the user's, which has nothing to go back to."""


def enter(context):
    with context:
        pass


CASES = {
    "convert a dict": (lambda: syncbn.convert_sync_batchnorm({}), TypeError, "received dict. Pass the model"),
    "convert a class": (lambda: syncbn.convert_sync_batchnorm(nn.BatchNorm1d), TypeError, "received type. Pass"),
    "group_size True": (lambda: syncbn.convert_sync_batchnorm(model(), group_size=True), ValueError, "received True"),
    "group_size text": (
        lambda: syncbn.SyncBatchNorm(3, group_size="2"),
        ValueError,
        "an integer >= 1 or 'node'; received '2'",
    ),
    "group a list": (lambda: syncbn.SyncBatchNorm(3, process_group=[0]), TypeError, "received list: [0]. Pass None"),
    "revert a list": (lambda: syncbn.revert_sync_batchnorm(model(), otherwise=[nn.BatchNorm1d]), TypeError, OTHERWISE),
    "revert an object": (lambda: syncbn.revert_sync_batchnorm(model(), otherwise=nn.ReLU()), TypeError, "ReLU()"),
    "freeze a dict": (lambda: syncbn.freeze({}), TypeError, "syncbn.freeze needs a torch.nn.Module; received dict"),
    "freeze affine": (lambda: syncbn.freeze(model(), affine="no"), TypeError, "affine=True or False; received 'no'"),
    "unfreeze a list": (
        lambda: syncbn.unfreeze([]),
        TypeError,
        "syncbn.unfreeze needs a torch.nn.Module; received list",
    ),
    "unfreeze affine": (lambda: syncbn.unfreeze(model(), affine=2), TypeError, "affine=True or False; received 2"),
    "no_sync of 5": (
        lambda: enter(syncbn.no_sync(5)),
        TypeError,
        "syncbn.no_sync needs a torch.nn.Module; received int",
    ),
    "features text": (
        lambda: syncbn.SyncBatchNorm("3"),
        ValueError,
        "num_features >= 1, the channels of its input; recei",
    ),
    "features -1": (lambda: syncbn.SyncBatchNorm(-1), ValueError, "received -1. Pass x.size(1)"),
    "features True": (lambda: syncbn.SyncBatchNorm2d(True), ValueError, "received True. Pass x.size(1)"),
    "dtype text": (
        lambda: syncbn.SyncBatchNorm(3, dtype="float32"),
        TypeError,
        "or None; received 'float32'. Pass one",
    ),
    "dtype int": (lambda: syncbn.SyncBatchNorm(3, dtype=torch.int32), TypeError, "received torch.int32. Pass one"),
    "renorm 3": (lambda: syncbn.SyncBatchNorm(3, renorm_limits=3), TypeError, f"{PAIR}3. Pass syncbn.RenormLimits"),
    "renorm of 3": (lambda: syncbn.SyncBatchNorm(3, renorm_limits=(1, 2, 3)), TypeError, f"{PAIR}(1, 2, 3)"),
    "renorm texts": (lambda: syncbn.LazySyncBatchNorm(renorm_limits=("3", "5")), ValueError, f"{PAIR}('3', '5')"),
    "renorm set": (
        lambda: setattr(syncbn.SyncBatchNorm(3), "renorm_limits", {1: 2, 3: 4}),
        TypeError,
        f"{PAIR}{{1: 2,",
    ),
    "weight remedy": (
        lambda: sync_batch_norm(X, weight=torch.ones(5)),
        ValueError,
        "if the input is right, make the others with torch.ones(3), for example.",
    ),
    "revert a subclass": (
        lambda: syncbn.revert_sync_batchnorm(Sub(3), otherwise=nn.BatchNorm1d),
        TypeError,
        "revert_sync_batchnorm must restore each layer without loss; it cannot for 1 of 1 layers, and nothing was "
        "changed:\n  (the module itself): its class and methods",
    ),
    "weight": (lambda: sync_batch_norm(X, weight=torch.ones(5)), ValueError, f"{WIDTHS}weight of 5, and an input of 3"),
    "one of two": (
        lambda: sync_batch_norm(X, torch.zeros(5), torch.ones(3)),
        ValueError,
        "needs running_mean of shape (3,) and a floating dtype; received shape (5,)",
    ),
    "the input": (
        lambda: sync_batch_norm(X[:, :2], torch.zeros(3), torch.ones(3), torch.ones(3), torch.ones(3)),
        ValueError,
        "running_var of 3, and an input of 2 channels, shape (2, 2, 2). Channels come second",
    ),
    "spec": (lambda: syncbn.GroupSpec("mpi", 3), TypeError, "syncbn.GroupSpec needs a tuple of ranks, integers >= 0"),
}


@pytest.mark.parametrize("what", CASES)
def test_a_wrong_argument_is_an_error_that_names_it(what):
    call, kind, text = CASES[what]
    with pytest.raises(kind) as caught:
        call()
    assert type(caught.value) is kind
    assert text in str(caught.value)


def test_integers_of_numpy_are_integers():
    assert syncbn.SyncBatchNorm(np.int64(3)).weight.shape == (3,)


def test_what_a_function_of_only_raises_says_where():
    with pytest.raises(TypeError) as caught:
        syncbn.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(3)), only=lambda name: True)
    assert any("the function of only= for '0'; it takes (name, layer)" in note for note in caught.value.__notes__)
