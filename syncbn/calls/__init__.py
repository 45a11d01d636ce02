# SPDX-License-Identifier: BSD-3-Clause
"""How one forward and its backward are done: with which kernels, in which group, under which identity.

``eager.py`` in eager mode, ``compiled.py`` for a compiler and for second derivatives, by the registered operators of
``operators.py`` in the order of ``order.py``. ``sites.py`` is who calls. ``checkpointing.py`` returns the sums of a
forward to the one that repeats it, ``renorm.py`` makes another weight and bias.
"""
