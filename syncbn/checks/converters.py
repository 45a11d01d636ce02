# SPDX-License-Identifier: BSD-3-Clause
"""What happens when another library's conversion meets layers that are synchronised already: it is refused.

Such a function replaces every ``_BatchNorm`` by a new layer, and would lose ours in silence. There is nothing that it
asks a layer before, but all of them read ``layer.affine``.
"""

from __future__ import annotations

from types import FrameType

_CONVERTERS = frozenset({"convert_sync_batchnorm", "convert_syncbn_model"})
"""The functions of torch, timm and mmengine, and that of apex. Lightning and accelerate call torch's."""


def converts(caller: FrameType) -> bool:
    """Whether a frame, which reads ``affine``, is that of another library's conversion."""
    return caller.f_code.co_name in _CONVERTERS and _module(caller).split(".")[0] != "syncbn"


def conversion_error(caller: FrameType, label: str) -> TypeError:
    """Returns the error of another library's conversion.

    Args:
        caller: the frame of its function.
        label: how to call the layer that it would replace.
    """
    return TypeError(
        f"{caller.f_code.co_name} of {_module(caller)} needs layers that are not synchronised yet; received {label!r}, "
        "a layer of syncbn. It would replace the layer and lose its hooks, name and group. Leave that call out (in "
        "Lightning it is sync_batchnorm=True), or call syncbn.revert_sync_batchnorm(model) first."
    )


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))
