# SPDX-License-Identifier: BSD-3-Clause
"""What digits.py measures on rank 0 and shows at the end: the table or JSON, the figure, the result."""

import dataclasses
import json
from argparse import Namespace
from pathlib import Path
from statistics import median

import torch
from digits_data import Data
from tabulate import tabulate
from torch import Tensor, nn

COMPARE_AT = 20
TOLERANCE = {"float32": 1e-5, "float64": 1e-13}  # measured after COMPARE_AT steps: 2e-7 and 5e-16
EVALUATIONS, POINTS = 20, 100  # of the curves
BROAD = {"color": "0.75", "linewidth": 7}  # the one-process run, under the others
LOOKS = [BROAD, {"color": "#d55e00", "linewidth": 2}, {"color": "#0072b2", "linewidth": 2, "linestyle": "--"}]
NOTE = {"ha": "right", "va": "top", "fontsize": 12, "color": "0.35"}


@dataclasses.dataclass
class Arm:
    """One training run."""

    name: str
    accuracy: dict[int, float] = dataclasses.field(default_factory=dict)
    """Test accuracy, by step."""
    difference: dict[int, float] = dataclasses.field(default_factory=dict)
    """Largest difference of a parameter to the one-process run, by step."""
    seconds: list[float] = dataclasses.field(default_factory=list)

    def observe(self, step: int, steps: int, model: nn.Module, data: Data, reference: dict[int, Tensor]) -> None:
        """Records accuracy and difference. The first arm fills ``reference``; the others are compared with it."""
        if step <= COMPARE_AT or step == steps or step % max(steps // POINTS, 1) == 0:
            parameters = torch.cat([p.detach().flatten() for p in model.parameters()])
            self.difference[step] = (parameters - reference.setdefault(step, parameters)).abs().max().item()
        if step == steps or step % max(steps // EVALUATIONS, 1) == 0:
            model.eval()  # SyncBatchNorm does not communicate in eval, so rank 0 may call it alone
            with torch.no_grad():
                predicted = torch.cat([model(part).argmax(1) for part in data.test_x.split(100)])
            self.accuracy[step] = (predicted == data.test_y).double().mean().item()
            model.train()

    def summary(self, compare_at: int) -> dict[str, float]:
        """The figures of the table."""
        return {
            "test_accuracy": self.accuracy[max(self.accuracy)],
            "difference": self.difference[compare_at],
            "difference_at_end": self.difference[max(self.difference)],
            "seconds_per_step": median(self.seconds),
        }


def show(arms: list[Arm], args: Namespace, processes: str) -> Exception | None:
    """Prints the results, draws the figure, and returns an error if SyncBatchNorm left the one-process run."""
    compare_at, tolerance = min(COMPARE_AT, args.steps), TOLERANCE[args.dtype]
    results = {arm.name: arm.summary(compare_at) for arm in arms}
    plain, synchronised = (results[arm.name]["difference"] for arm in arms[1:])
    tracks = synchronised <= tolerance  # False for NaN too
    title = f"Batch of {args.batch} on {processes}, {args.dtype}"
    draw(arms, args.out, title=title, tolerance=tolerance)
    if args.json:
        setting = {"title": title, "compare_at": compare_at, "steps": args.steps, "tolerance": tolerance}
        curves = {arm.name: {"accuracy": arm.accuracy, "difference": arm.difference} for arm in arms}
        found = {"figure": str(args.out), "tracks": tracks, "arms": results, "curves": curves}
        print(json.dumps({**setting, **found}, indent=2))
    else:
        headers = ["arm", "test accuracy", f"difference, step {compare_at}", f"step {args.steps}", "s / step"]
        rows = [[name, *result.values()] for name, result in results.items()]
        print(tabulate(rows, headers, floatfmt=("", ".3f", ".1e", ".1e", ".4f"), tablefmt="github"))
        print(f"{title}; difference: the largest of any parameter to the one-process run")
        print(f"curves: {args.out}")
    if not tracks:
        need = f"SyncBatchNorm must stay within {tolerance:g} of the one-process run at step {compare_at}"
        return RuntimeError(f"{need}; received a parameter difference of {synchronised:.1e}. Run `syncbn doctor`.")
    if not args.json:
        print(f"SyncBatchNorm tracks the one-process run to rounding: {synchronised:.1e}. BatchNorm2d: {plain:.1e}.")
    return None


def draw(arms: list[Arm], path: Path, *, title: str, tolerance: float) -> None:
    """Draws accuracy and difference by step."""
    from matplotlib.figure import Figure  # without pyplot, which may look for a display

    figure = Figure(figsize=(12, 5), dpi=120, layout="constrained")
    figure.suptitle(title, fontsize=15)
    left, right = figure.subplots(1, 2)
    for arm, look in zip(arms, LOOKS, strict=True):
        left.plot(list(arm.accuracy), list(arm.accuracy.values()), label=arm.name, **look)
        right.semilogy(list(arm.difference), [value or None for value in arm.difference.values()], **look)
    lowest = min(right.get_ylim()[0], tolerance / 100)
    right.axhspan(lowest, tolerance, color="0.93")
    right.set_ylim(bottom=lowest)
    right.text(0.98, tolerance, f"rounding: below {tolerance:g} ", transform=right.get_yaxis_transform(), **NOTE)
    left.set(title="Test accuracy", ylabel="share of test images recognised")
    right.set(title="Difference to the one-process run", ylabel="largest |difference| of a parameter")
    for axes in (left, right):
        axes.set_xlim(left=0)
        axes.set_xlabel("step of SGD", fontsize=12)
        axes.title.set_size(13)
        axes.yaxis.label.set_size(12)
        axes.tick_params(labelsize=11)
        axes.grid(alpha=0.3)
    left.legend(fontsize=12, loc="lower right")
    figure.savefig(path)
