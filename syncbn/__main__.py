# SPDX-License-Identifier: BSD-3-Clause
"""Makes ``python -m syncbn`` the same as ``syncbn``, for launchers that start Python."""

import sys

from syncbn.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
