# SPDX-License-Identifier: BSD-3-Clause
"""A converted layer is an instance of the class that it had, and other libraries' conversions do not replace it."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import syncbn
from syncbn import convert_sync_batchnorm, revert_sync_batchnorm
from syncbn.calls.sites import site_of

SHAPES = {
    nn.BatchNorm1d: [(4, 3), (4, 3, 5)],
    nn.BatchNorm2d: [(4, 3, 5, 5)],
    nn.BatchNorm3d: [(4, 3, 5, 5, 5)],
}
WRONG = {cls: [(4, 3), (4, 3, 2), (4, 3, 2, 2), (4, 3, 2, 2, 2), (4, 3, 2, 2, 2, 2)] for cls in SHAPES}
WRONG = {cls: [s for s in shapes if len(s) not in map(len, SHAPES[cls])] for cls, shapes in WRONG.items()}
CASES = [(cls, shape) for cls in SHAPES for shape in WRONG[cls]]


@pytest.mark.parametrize(("cls", "shape"), [(cls, shape) for cls in SHAPES for shape in SHAPES[cls]])
@pytest.mark.parametrize("training", [True, False])
def test_a_converted_layer_takes_the_inputs_of_its_class(cls, shape, training):
    plain = cls(3).train(training)
    layer, x = convert_sync_batchnorm(copy.deepcopy(plain)), torch.randn(shape)
    torch.testing.assert_close(layer(x), plain(x))


@pytest.mark.parametrize(("cls", "shape"), CASES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("lazy", [False, True])
def test_a_converted_layer_refuses_the_inputs_that_its_class_refuses(cls, shape, training, lazy):
    make = getattr(nn, f"Lazy{cls.__name__}") if lazy else lambda: cls(3)
    with pytest.raises(ValueError, match="expected"):
        make().train(training)(torch.ones(shape))
    layer = convert_sync_batchnorm(make()).train(training)
    need = (
        rf"Sync{cls.__name__} needs input\.dim\(\) .* as torch\.nn\.{cls.__name__} does; received {len(shape)}, shape"
    )
    with pytest.raises(ValueError, match=need):
        layer(torch.ones(shape))
    if lazy:
        assert layer.has_uninitialized_params()
    else:
        with pytest.raises(ValueError, match=need):
            layer._check_input_dim(torch.ones(shape))
        assert layer.num_batches_tracked == 0


def test_a_plain_layer_takes_any_number_of_dims():
    layer = convert_sync_batchnorm(nn.SyncBatchNorm(3))
    for shape in ((4, 3), (4, 3, 2), (4, 3, 2, 2, 2, 2)):
        assert layer(torch.randn(shape)).shape == shape


@pytest.mark.parametrize("cls", SHAPES)
def test_a_layer_made_by_hand_reverts_to_the_class_that_it_is(cls):
    layer = getattr(syncbn, f"Sync{cls.__name__}")(3, eps=0.5, momentum=None, group_size=1)
    assert isinstance(layer, cls)
    assert layer.converted_from is None
    assert type(revert_sync_batchnorm(layer)) is cls
    assert layer.eps == 0.5
    lazy = getattr(syncbn, f"LazySync{cls.__name__}")()
    lazy(torch.randn(SHAPES[cls][0]))
    assert type(lazy) is getattr(syncbn, f"Sync{cls.__name__}")


@pytest.mark.parametrize("cls", [*SHAPES, nn.LazyBatchNorm2d])
def test_copies_and_pickles_have_the_class_and_come_back(cls):
    layer = convert_sync_batchnorm(cls(momentum=0.2) if cls is nn.LazyBatchNorm2d else cls(3, affine=False))
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    others = [pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False)]
    if cls is not nn.LazyBatchNorm2d:  # torch copies no parameter without a shape
        others.append(copy.deepcopy(layer))
    for other in others:
        assert type(other) is type(layer)
        assert other.affine is layer.affine
        assert repr(other) == repr(layer)
        assert type(revert_sync_batchnorm(other)) is cls
    assert f"syncbn\n{type(layer).__name__}".encode() in pickle.dumps(layer, protocol=0)


def test_a_pickle_of_before_still_loads():
    """A converted layer was a plain SyncBatchNorm then."""
    layer = syncbn.SyncBatchNorm(3)
    site_of(layer).converted_from = nn.BatchNorm2d
    other = pickle.loads(pickle.dumps(layer))
    assert other(torch.randn(4, 3)).shape == (4, 3)
    assert type(revert_sync_batchnorm(other)) is nn.BatchNorm2d


def test_the_text_of_a_layer_is_that_of_torch():
    plain = nn.BatchNorm2d(3, eps=0.1)
    assert repr(convert_sync_batchnorm(copy.deepcopy(plain))) == f"Sync{plain!r}"


def convert_syncbn_model(module):
    """As apex does it."""
    made = module
    if isinstance(module, _BatchNorm):
        made = nn.GroupNorm(1, module.num_features, module.eps, module.affine)
    for name, child in module.named_children():
        made.add_module(name, convert_syncbn_model(child))
    return made


@pytest.mark.parametrize(
    ("convert", "module"),
    [(nn.SyncBatchNorm.convert_sync_batchnorm, "torch.nn.modules.batchnorm"), (convert_syncbn_model, __name__)],
)
def test_the_conversion_of_another_library_is_refused_and_replaces_nothing(convert, module):
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ModuleDict({"norm": nn.BatchNorm2d(3)}))
    convert(copy.deepcopy(model))
    layer = convert_sync_batchnorm(model)[1]["norm"]
    words = rf"of {module} needs layers that are not synchronised yet; received '1\.norm', .*revert_sync_batchnorm"
    with pytest.raises(TypeError, match=words):
        convert(model)
    assert model[1]["norm"] is layer
    assert isinstance(convert(revert_sync_batchnorm(model))[1]["norm"], nn.SyncBatchNorm | nn.GroupNorm)


def test_affine_is_an_attribute_like_any_other():
    layer = convert_sync_batchnorm(nn.BatchNorm2d(3, affine=False))
    assert layer.affine is False
    assert vars(layer)["affine"] is False
    layer.affine = True
    assert layer.affine is True
    assert vars(revert_sync_batchnorm(layer))["affine"] is True
    assert torch.compile(lambda x: x * layer.affine, backend="eager", fullgraph=True)(torch.ones(2)).sum() == 2
