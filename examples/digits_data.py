# SPDX-License-Identifier: BSD-3-Clause
"""Loads, checks and splits scikit-learn's digits or the user's own images, for digits.py and mlp.py."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

TEST_SHARE, TEST_LIMIT = 0.2, 1000
LARGEST = 1e18  # the square of a larger value overflows float32
FORM = "save them with np.savez(FILE, x=images, y=classes)"


class Data(NamedTuple):
    """Images (N, C, H, W) and classes (N,) for training and for the test."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: int


def load(
    path: Path | None, *, smallest_batch: int, seed: int, dtype: torch.dtype = torch.float32, side: int | None = None
) -> Data:
    """Reads and splits the data, the same way on every rank.

    Args:
        path: an .npz file with ``x``, (N, H, W) or (N, C, H, W), and ``y``, (N,) integers; None for the digits.
        smallest_batch: the least number of images in the training part.
        seed: the seed of the split.
        dtype: the dtype of the images. They are scaled to mean 0 and standard deviation 1.
        side: images must be side x side, or rows of side * side values. The digits are scaled up to it.

    Raises:
        ValueError: if the file is wrong. On this rank alone: pass it to ``World.raise_together``.
    """
    x, y = _digits(side) if path is None else _read(path)
    if side and x.ndim == 2 and x.shape[1] == side * side:
        x = x.reshape(len(x), side, side)
    _check(x, y, smallest_batch, side)
    images = torch.from_numpy(x.astype(np.float64)).to(dtype)
    images = images.unsqueeze(1) if images.ndim == 3 else images
    names, classes = np.unique(y, return_inverse=True)  # 3, 7, 100 become 0, 1, 2
    targets = torch.from_numpy(classes.astype(np.int64))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    test, train = order.tensor_split([_test_size(len(x))])
    std, mean = torch.std_mean(images[train])
    images = (images - mean) / (std if std > 0 else 1)
    return Data(images[train], targets[train], images[test], targets[test], len(names))


def _digits(side: int | None) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images)[:, None]
    images = images if side is None else F.interpolate(images, (side, side), mode="bilinear")
    return images.numpy(), digits.target


def _read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Returns ``x`` and ``y`` of an .npz file. Never unpickles: a pickle can run any code."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return arrays["x"], arrays["y"]
    except Exception as error:  # of many kinds: no file, no archive, a damaged one, no such array, an array of objects
        need = "an .npz file with arrays of numbers x and y"
        raise ValueError(f"--data needs {need}; received {path}: {error}. Please {FORM}.") from error


def _check(x: np.ndarray, y: np.ndarray, smallest_batch: int, side: int | None) -> None:
    """Raises ValueError unless x and y can be used by :func:`load`."""
    shapes = f"x {x.shape} of {x.dtype} and y {y.shape} of {y.dtype}"
    if x.ndim not in (3, 4) or y.ndim != 1 or len(x) != len(y):
        need = "x of shape (N, H, W) or (N, C, H, W) and y of shape (N,)"
        raise ValueError(f"--data needs {need}; received {shapes}. Please {FORM}.")
    if x.dtype.kind not in "buif":
        raise ValueError(f"--data needs real numbers in x; received {shapes}. Convert x, for example to float32.")
    if y.dtype.kind not in "ui":
        raise ValueError(f"--data needs integer classes in y; received {shapes}. Convert y, for example to int64.")
    if side and x.shape[1:] not in ((side, side), (1, side, side)):
        need = f"{side} x {side} images, or rows of {side * side}, in x"
        raise ValueError(f"--data needs {need}; received {shapes}. Scale them to that size.")
    if min(x.shape[-2:]) < 4 or (x.ndim == 4 and x.shape[1] == 0):
        raise ValueError(f"--data needs images of at least 4 x 4 in x; received {shapes}. Enlarge or pad them.")
    if len(x) - _test_size(len(x)) < smallest_batch or _test_size(len(x)) < 1:
        need = f"a training part of at least one batch of {smallest_batch}"
        raise ValueError(f"--data needs {need}; received {shapes}. Add images, or choose a smaller --batch.")
    wrong = np.flatnonzero(~(np.abs(x.reshape(len(x), -1).astype(np.float64)) < LARGEST).all(1))
    if len(wrong):
        received = f"{len(wrong)} of {len(x)} images with other values, the first at index {wrong[0]}"
        raise ValueError(f"--data needs finite |x| < {LARGEST:g}; received {received}. Remove or repair them.")
    if len(np.unique(y)) < 2:
        raise ValueError(f"--data needs at least two classes in y; received only {np.unique(y)}. Check the labels.")


def _test_size(n: int) -> int:
    return min(int(TEST_SHARE * n), TEST_LIMIT)
