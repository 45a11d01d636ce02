# SPDX-License-Identifier: BSD-3-Clause
"""drift(): how far local statistics are from those of the global batch, layer by layer.

``measuring.py`` opens the report and hangs the hooks, ``local.py`` is what a rank sends of a call, ``sums.py`` what is
added up, ``noise.py`` the values for independent samples, ``report.py`` and ``figure.py`` the answer. ``timing.py``
measures the collectives of synchronised layers.
"""
