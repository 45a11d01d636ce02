# SPDX-License-Identifier: BSD-3-Clause
"""The two batch norms of timm, for tests without timm: what is inside, and in which order it runs."""

import sys
import types

from torch import nn


class BatchNormAct2d(nn.BatchNorm2d):
    def __init__(self, num_features, drop_layer=None, act_layer=nn.ReLU, **options):
        super().__init__(num_features, **options)
        self.drop = nn.Identity() if drop_layer is None else drop_layer()
        self.act = act_layer(inplace=True)

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


class SyncBatchNormAct(nn.SyncBatchNorm):
    def forward(self, x):
        raise AssertionError("timm's layer does not train on CPU")


def install(monkeypatch):
    """Lets ``timm`` be this module until the test ends."""
    norm_act, layers = types.ModuleType("timm.layers.norm_act"), types.ModuleType("timm.layers")
    norm_act.BatchNormAct2d, norm_act.SyncBatchNormAct = BatchNormAct2d, SyncBatchNormAct
    layers.norm_act = norm_act
    for name, module in {"timm": types.ModuleType("timm"), "timm.layers": layers, norm_act.__name__: norm_act}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "syncbn.convert.timm_layers", raising=False)
    import syncbn.convert

    monkeypatch.delattr(syncbn.convert, "timm_layers", raising=False)
    return norm_act
