# SPDX-License-Identifier: BSD-3-Clause
"""The recipes of the pages for Lightning and Accelerate train on two processes as on one, however these are started.

They are the marked parts of the pages' programs. tests/project/test_blocks.py runs the programs themselves.
"""

import json
import os
import re
import sys

import pytest
import torch
from torch import nn

from syncbn.transports import launchers
from tests.processes import ROOT
from tests.warm import mpirun, torchrun

CODE = ROOT / "docs" / "code"
STEPS, SHARE = 6, 4

pytestmark = [
    pytest.mark.program,
    pytest.mark.skipif(launchers.detect().size > 1, reason="starts its own processes"),
]
each_launcher = pytest.mark.parametrize(
    ("launcher", "first"), [(torchrun, ""), (mpirun, "syncbn.init(torch_distributed=True)")], ids=["torchrun", "mpirun"]
)
"""What the pages say that a program calls first under each."""

START = f"""
import json
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 4)).double()

def loss(y, x):
    return (y - x).square().mean()

x = torch.randn({2 * SHARE * STEPS}, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
loader = DataLoader(TensorDataset(x), batch_size={SHARE})  # the sampler of either library deals them out in turn
"""

LIGHTNING = """
class Classifier(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = network()

    def training_step(self, batch, index):
        return loss(self.model(batch[0]), batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
trainer = pl.Trainer(accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, plugins=PLUGINS, **quiet)
rank = trainer.global_rank
sampler = torch.utils.data.distributed.DistributedSampler(x, 2, rank, shuffle=False)
CONVERT
trainer.fit(model, DataLoader(TensorDataset(x), batch_size=4, sampler=sampler))
model = model.model
"""

ACCELERATE = """
model = network()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
CONVERT
accelerator = Accelerator(cpu=True)
wrapped, optimizer, loader = accelerator.prepare(model, optimizer, loader)
for (batch,) in loader:
    optimizer.zero_grad()
    accelerator.backward(loss(wrapped(batch), batch))
    optimizer.step()
rank = accelerator.process_index
"""

END = """
if rank == 0:
    kinds = [type(m).__name__ for m in model]
    print("RESULT", json.dumps([kinds, {n: v.tolist() for n, v in model.state_dict().items()}]), flush=True)
"""


def part(program, name):
    """A marked part of a program of a page."""
    text = (CODE / program).read_text()
    found = re.search(rf"\[start:{name}\]\n(.*?)^# --8<-- \[end:{name}\]", text, re.MULTILINE | re.DOTALL)
    return found.group(1)


def line(program, word):
    """The line of a page's part that converts."""
    return next(line for line in part(program, "change").splitlines() if word in line)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 4)).double()


@pytest.fixture(scope="module")
def expected():
    """One process: in each step the rows that both processes have together."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(2 * SHARE * STEPS, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for batch in x.split(2 * SHARE):
        optimizer.zero_grad()
        (model(batch) - batch).square().mean().backward()
        optimizer.step()
    return model.state_dict()


def results(launcher, head, *trainings, last="", tmp_path):
    """What trainings one after the other give, in the same two processes: to import a wrapper takes long."""
    path = tmp_path / "program.py"
    path.write_text("\n".join([head, START, *[training + END for training in trainings], last]))
    done = launcher(2, path, HF_HUB_OFFLINE=1, PYTHONPATH=python_path())
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in re.findall(r"^RESULT (.*)$", done.stdout, re.MULTILINE)]


def python_path():
    return os.pathsep.join([str(ROOT), *[p for p in sys.path if p]])


def gap(state, reference):
    return max((torch.tensor(v, dtype=torch.float64) - reference[n]).abs().max().item() for n, v in state.items())


@each_launcher
def test_lightning_with_a_converted_model_or_our_plugin_trains_as_one_process(launcher, first, expected, tmp_path):
    pytest.importorskip("lightning", reason='pip install "syncbn[wrappers]"')
    plugin = part("train_lightning_plugin.py", "plugin")
    assert "plugins=[SyncBatchNormSync()]" in part("train_lightning_plugin.py", "change")
    convert, keep = line("train_lightning.py", "Classifier()"), "model = Classifier()"
    assert "syncbn.convert_sync_batchnorm" in convert
    ways = [("[]", convert), ("[SyncBatchNormSync()]", keep), ("[]", keep)]
    trainings = [LIGHTNING.replace("PLUGINS", plugins).replace("CONVERT", how) for plugins, how in ways]
    head = "\n".join(
        [
            "import lightning.pytorch as pl",
            "from lightning.pytorch.plugins import LayerSync",
            "import syncbn",
            plugin,
            first,
        ]
    )
    (kinds, state), (reverted, with_plugin), (_, without) = results(launcher, head, *trainings, tmp_path=tmp_path)
    assert gap(state, expected) < 1e-12
    assert gap(with_plugin, expected) < 1e-12
    assert gap(without, expected) > 1e-4
    assert kinds[1] == "SyncBatchNorm1d"
    assert reverted[1] == "BatchNorm1d"  # at the end of the fit


@each_launcher
def test_accelerate_with_a_converted_model_trains_as_one_process(launcher, first, expected, tmp_path):
    pytest.importorskip("accelerate", reason='pip install "syncbn[wrappers]"')
    convert = line("train_accelerate.py", "build()").replace("build()", "model")
    assert "syncbn.convert_sync_batchnorm" in convert
    head = "\n".join(["import syncbn", "from accelerate import Accelerator", first])
    trainings = [ACCELERATE.replace("CONVERT", how) for how in (convert, "")]
    last = "accelerator.end_training()"
    (kinds, state), (_, without) = results(launcher, head, *trainings, last=last, tmp_path=tmp_path)
    assert gap(state, expected) < 1e-12
    assert kinds[1] == "SyncBatchNorm1d"
    assert gap(without, expected) > 1e-4
