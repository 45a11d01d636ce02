# SPDX-License-Identifier: BSD-3-Clause
"""Makes ``python -m syncbn`` the same as ``syncbn``, for launchers that want a Python program."""

import sys

from syncbn.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
