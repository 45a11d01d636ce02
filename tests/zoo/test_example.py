# SPDX-License-Identifier: BSD-3-Clause
"""The example that trains a network of timm."""

import re

from tests.processes import mpirun, python

PROGRAM = ("-m", "tests.zoo.torchvision_ops", "examples/finetune_timm.py")


def differences(text):
    """The last column of each row: the parameters' difference to the run of one process."""
    return {
        row[1].strip(): float(row[2]) for row in re.finditer(r"^\| ([\w ]+?) +\|.*\| +(\d\S+) \|$", text, re.MULTILINE)
    }


def test_a_network_of_timm_trains_as_in_one_process_if_converted_and_only_then():
    done = mpirun(2, *PROGRAM, "--steps", 5)
    assert done.returncode == 0, done.stderr
    found = differences(done.stdout)
    assert found["one process"] == 0
    assert found["SyncBatchNorm"] < 1e-6, done.stdout
    assert found["local"] > 1e-3, done.stdout
    assert "mobilenetv3_small_050 after 5 steps of 4 images, 2 a process" in done.stdout


def test_the_example_says_what_to_install():
    words = "import runpy, sys; sys.modules['timm'] = None; sys.path.insert(0, 'examples'); sys.argv = sys.argv[1:]"
    done = python("-c", f"{words}; runpy.run_path(sys.argv[0], run_name='__main__')", "examples/finetune_timm.py")
    assert done.returncode == 2
    assert 'pip install "syncbn[zoo]"' in done.stderr
    assert "Traceback" not in done.stderr
