# SPDX-License-Identifier: BSD-3-Clause
"""The recipes of docs/wrappers.md for Lightning and Accelerate train on two processes as on one."""

import json
import re

import pytest
import torch
from torch import nn

from syncbn.transports import launchers
from tests.processes import ROOT, torchrun

PAGE = ROOT / "docs" / "wrappers.md"
STEPS, SHARE = 6, 4

pytestmark = [
    pytest.mark.program,
    pytest.mark.skipif(launchers.detect().size > 1, reason="starts its own processes"),
]

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
class Lit(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = network()

    def training_step(self, batch, index):
        return loss(self.model(batch[0]), batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
sampler = torch.utils.data.distributed.DistributedSampler(x, 2, int(__import__("os").environ["RANK"]), shuffle=False)
loader = DataLoader(TensorDataset(x), batch_size=4, sampler=sampler)
trainer = pl.Trainer(accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, plugins=PLUGINS, **quiet)
lit = Lit()
trainer.fit(lit, loader)
rank, model = trainer.global_rank, lit.model
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


def recipe(heading):
    """The Python block below a heading of the page."""
    text = PAGE.read_text().split(f"### {heading}\n")[1]
    return re.search(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL).group(1)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 4)).double()


def expected(rows):
    """One process: in each step the rows that both processes have together."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(2 * SHARE * STEPS, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for step in range(STEPS):
        batch = x[rows(step)]
        optimizer.zero_grad()
        (model(batch) - batch).square().mean().backward()
        optimizer.step()
    return model.state_dict()


def results(head, *trainings, last="", tmp_path):
    """What trainings one after the other give, in the same two processes: to import a wrapper takes long."""
    path = tmp_path / "program.py"
    path.write_text(head + START + "".join(training + END for training in trainings) + last)
    done = torchrun(2, path, HF_HUB_OFFLINE=1, PYTHONPATH=python_path())
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in re.findall(r"^RESULT (.*)$", done.stdout, re.MULTILINE)]


def python_path():
    import os
    import sys

    return os.pathsep.join([str(ROOT), *[p for p in sys.path if p]])


def gap(state, reference):
    return max((torch.tensor(v, dtype=torch.float64) - reference[n]).abs().max().item() for n, v in state.items())


def test_lightning_with_our_plugin_trains_as_one_process(tmp_path):
    pytest.importorskip("lightning", reason='pip install "syncbn[wrappers]"')
    reference = expected(lambda step: slice(2 * SHARE * step, 2 * SHARE * (step + 1)))
    trainings = [LIGHTNING.replace("PLUGINS", plugins) for plugins in ("[SyncBatchNormSync()]", "[]")]
    (kinds, state), (_, without) = results(recipe("Lightning"), *trainings, tmp_path=tmp_path)
    assert gap(state, reference) < 1e-12
    assert kinds[1] == "BatchNorm1d"  # reverted at the end of the fit
    assert gap(without, reference) > 1e-4


def test_accelerate_with_a_converted_model_trains_as_one_process(tmp_path):
    pytest.importorskip("accelerate", reason='pip install "syncbn[wrappers]"')
    reference = expected(lambda step: slice(2 * SHARE * step, 2 * SHARE * (step + 1)))
    convert = "model = syncbn.convert_sync_batchnorm(model)"
    head = "import syncbn\nfrom accelerate import Accelerator\n"
    assert convert in recipe("Accelerate")
    assert "from accelerate import Accelerator" in recipe("Accelerate")
    trainings = [ACCELERATE.replace("CONVERT", how) for how in (convert, "")]
    last = "accelerator.end_training()"
    (kinds, state), (_, without) = results(head, *trainings, last=last, tmp_path=tmp_path)
    assert gap(state, reference) < 1e-12
    assert kinds[1] == "SyncBatchNorm1d"
    assert gap(without, reference) > 1e-4
