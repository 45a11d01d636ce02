# SPDX-License-Identifier: BSD-3-Clause
"""Builds architectures of timm and torchvision without memory, converts and reverts them, and says what was found.

    python -m tests.zoo.scan        all of them, some 1500, in about 6 minutes

prints a row for each set of batch norm classes. The tests do the same with the first architecture of each
file of the libraries.
"""

import importlib
import inspect
import re
from collections import Counter

import torch
from tabulate import tabulate
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

import syncbn
from tests.zoo import torchvision_ops

torchvision_ops.declare()
import timm  # noqa: E402 - it imports torchvision
import torchvision  # noqa: E402

WITH_BACKBONE = re.compile("rcnn|retinanet|ssd|fcos|deeplab|fcn_|lraspp")  # which they would download


def architectures():
    """Every architecture, by library and file."""
    found = {("timm", file): timm.list_models(module=file) for file in timm.list_modules()}
    for name in torchvision.models.list_models():
        file = torchvision.models.get_model_builder(name).__module__.rpartition(".")[2]
        found.setdefault(("torchvision", file), []).append(name)
    return {key: names for key, names in found.items() if names}


def names_batch_norm(file):
    """Whether a file of timm names a layer that could be one."""
    text = inspect.getsource(importlib.import_module(f"timm.models.{file}"))
    return bool(re.search("BatchNorm|norm_?act|^from .byobnet|^from .resnet", text, re.IGNORECASE | re.MULTILINE))


def build(library, name):
    """A network on the meta device, or in memory where its constructor computes widths with tensors."""
    if library == "timm":
        with torch.device("meta"):
            return timm.create_model(name, pretrained=False)
    options = {"weights_backbone": None} if WITH_BACKBONE.search(name) else {}
    options |= {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    with torch.device("cpu" if name.startswith("regnet") else "meta"):
        return torchvision.models.get_model(name, weights=None, **options)


def classes(model):
    """The class of every module, by its name."""
    return {name: type(module) for name, module in model.named_modules()}


def batch_norms(model):
    return {type(module) for module in model.modules() if isinstance(module, _BatchNorm)}


def round_trip(model):
    """Converts a network and reverts it; returns what either left wrong."""
    before, keys, parameters = classes(model), list(model.state_dict()), list(model.parameters())
    try:
        syncbn.convert_sync_batchnorm(model)
    except TypeError as refused:
        return [str(refused).splitlines()[1]]
    after = dict(model.named_modules())
    wrong = [
        f"{name} is no {cls.__name__} any more" for name, cls in before.items() if not isinstance(after[name], cls)
    ]
    for name, module in after.items():
        if isinstance(module, _BatchNorm) and not isinstance(module, syncbn.SyncBatchNorm):
            wrong.append(f"{name} was not converted")
    wrong += ["other keys after conversion"] * (list(model.state_dict()) != keys)
    syncbn.revert_sync_batchnorm(model)
    wrong += ["other classes after the way back"] * (classes(model) != before)
    wrong += ["other keys after the way back"] * (list(model.state_dict()) != keys)
    wrong += ["other parameters"] * any(a is not b for a, b in zip(model.parameters(), parameters, strict=True))
    return wrong


def main():
    found, problems = Counter(), []
    todo = [(library, name) for (library, _), names in architectures().items() for name in names]
    for library, name in tqdm(todo, mininterval=2):
        model = build(library, name)
        kinds = " and ".join(sorted(cls.__name__ for cls in batch_norms(model))) or "none"
        wrong = round_trip(model) if kinds != "none" else []
        found[library, kinds, "refused" if wrong else "converted" if kinds != "none" else ""] += 1
        problems += [f"{name}: {what}" for what in wrong[:1]]
    print("\n".join(problems))
    print(f"timm {timm.__version__}, torchvision {torchvision.__version__}, torch {torch.__version__}")
    rows = [[*key, count] for key, count in sorted(found.items())]
    print(tabulate(rows, ["library", "batch norm", "result", "architectures"], tablefmt="github"))


if __name__ == "__main__":
    main()
