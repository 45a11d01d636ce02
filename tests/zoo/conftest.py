# SPDX-License-Identifier: BSD-3-Clause
"""Tests of model libraries, collected where the extra zoo is installed: make test-all makes .venv-zoo for them."""

import importlib.util
import os
import tempfile

from tests.multiprocess.conftest import pytest_runtest_makereport, ranks  # noqa: F401 - a hook and a fixture
from tests.zoo import torchvision_ops

LIBRARIES = (
    "kornia",
    "monai",
    "segmentation_models_pytorch",
    "timm",
    "torch_geometric",
    "torchvision",
    "ultralytics",
)
if not all(importlib.util.find_spec(name) for name in LIBRARIES):
    collect_ignore_glob = ["test_*.py"]

torchvision_ops.declare()
# ultralytics writes its settings into a folder of the user otherwise, and installs packages that it misses.
os.environ["YOLO_CONFIG_DIR"] = os.environ.get("PYTEST_DEBUG_TEMPROOT") or tempfile.gettempdir()
os.environ["YOLO_AUTOINSTALL"] = "false"
os.environ["YOLO_OFFLINE"] = "true"
os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
