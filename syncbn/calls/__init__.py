# SPDX-License-Identifier: BSD-3-Clause
"""How one forward and its backward are done: with which kernels, in which group, under which identity.

``eager.py`` has the call of eager mode. ``compiled.py`` has the calls of torch.compile and of second derivatives, which
use the registered operators of ``operators.py`` in the order of ``order.py``. ``sites.py`` holds what a layer keeps
for its calls. ``checkpointing.py`` lets a repeated forward reuse the sums of the first one. ``renorm.py`` adjusts
weight and bias for batch renormalization.
"""
