# SPDX-License-Identifier: BSD-3-Clause
"""What the examples read: your own images, or an error that says what is wrong with them."""

import importlib
import sys

import numpy as np
import pytest
import torch

from tests.processes import ROOT


def npz(folder, name="mine", **arrays):
    path = folder / f"{name}.npz"
    np.savez(path, **arrays)
    return path


def images(n=40, *shape):
    return np.random.default_rng(0).random((n, *(shape or (8, 8))))


def labels(n=40):
    return np.arange(n) % 4


@pytest.fixture
def digits_data(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    yield importlib.import_module("digits_data")
    sys.modules.pop("digits_data")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": images(), "y": labels()[:, None]}, "y of shape"),
        ({"x": images(40, 64), "y": labels()}, "x of shape"),
        ({"x": images().astype(complex), "y": labels()}, "real numbers in x; received .* of complex128"),
        ({"x": images(), "y": labels() / 2}, "integer classes in y; received .* of float64"),
        ({"x": images(40, 3, 3), "y": labels()}, "images of at least 4 x 4"),
        ({"x": images(40, 0, 8, 8), "y": labels()}, "images of at least 4 x 4"),
        ({"x": images(9), "y": labels(9)}, "training part of at least one batch of 10"),
        ({"x": images(0), "y": labels(0)}, "training part of at least one batch of 10"),
        ({"x": images() * np.nan, "y": labels()}, "finite .* 40 of 40 images .* first at index 0"),
        ({"x": images() * 1e30, "y": labels()}, "finite"),
        ({"x": images(), "y": labels() * 0}, r"at least two classes in y; received only \[0\]"),
        ({"x": np.array([None] * 40), "y": labels()}, "arrays of numbers x and y; .* allow_pickle=False"),
        ({}, "x is not a file in the archive"),
    ],
)
def test_data_that_cannot_train_is_refused_with_its_reason(digits_data, arrays, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        digits_data.load(npz(tmp_path, **arrays), smallest_batch=10, seed=0)


def test_a_damaged_or_foreign_file_is_refused(digits_data, tmp_path):
    path = npz(tmp_path, x=images(), y=labels())
    whole = path.read_bytes()
    path.write_bytes(whole[:2000] + b"damage" + whole[2006:])
    with pytest.raises(ValueError, match=r"--data needs an \.npz file .*Bad CRC-32"):
        digits_data.load(path, smallest_batch=10, seed=0)
    path.write_bytes(whole[:2000])
    with pytest.raises(ValueError, match="not a zip file"):
        digits_data.load(path, smallest_batch=10, seed=0)
    with pytest.raises(ValueError, match="Is a directory"):
        digits_data.load(tmp_path, smallest_batch=10, seed=0)


def test_images_of_another_size_are_refused_for_a_fixed_network(digits_data, tmp_path):
    with pytest.raises(ValueError, match="28 x 28 images, or rows of 784, in x"):
        digits_data.load(npz(tmp_path, x=images(), y=labels()), smallest_batch=10, seed=0, side=28)


def test_loaded_images_are_scaled_and_split_without_overlap(digits_data, tmp_path):
    x = np.arange(40.0)[:, None, None] + np.zeros((40, 4, 4))
    data = digits_data.load(npz(tmp_path, x=x, y=labels()), smallest_batch=10, seed=0)
    assert (len(data.x), len(data.test_x), data.classes) == (32, 8, 4)
    assert data.x.mean().abs() < 1e-6
    assert torch.unique(torch.cat([data.x, data.test_x])[:, 0, 0, 0]).numel() == 40


def test_constant_images_do_not_divide_by_zero(digits_data, tmp_path):
    data = digits_data.load(npz(tmp_path, x=np.ones((40, 8, 8)), y=labels()), smallest_batch=10, seed=0)
    assert torch.equal(data.x, torch.zeros(32, 1, 8, 8))
