# SPDX-License-Identifier: BSD-3-Clause
"""The tables of docs/clusters/scale.md, made of the CSV files."""

from __future__ import annotations

import re
from pathlib import Path

from tabulate import tabulate

from benchmarks.scale import wires
from benchmarks.scale.results import OURS, THRESHOLD, TORCHS, Results, added_at

TITLES = {
    "fat_tree_nvlink": "200 Gb/s, NVLink-like node",
    "fat_tree_shared_memory": "200 Gb/s, shared memory",
    "ethernet": "Ethernet, 25 Gb/s, 20 us",
}
SHOWN = (2, 4, 8, 16, 32, 64, 512, 4096)
GROUPS = (8, 64)


def blocks(results: Results, step_ms: float) -> dict[str, str]:
    """Returns every table, by the name of its place on the page."""
    largest = max(results.ranks())
    return {
        "answer": answer(results, step_ms),
        "exchange": exchange(results),
        "bytes": sent(largest),
        "waiting": waiting(results, largest),
        "groups": groups(results, step_ms),
        "checks": checks(results),
        "run": "```text\n" + "\n".join(results.notes) + "\n```",
    }


def update(page: Path, results: Results, step_ms: float) -> None:
    """Writes the tables into the page, each between the comments with its name.

    Raises:
        ValueError: if the page has no place for one.
    """
    text = page.read_text(encoding="utf-8")
    for name, block in blocks(results, step_ms).items():
        place = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        text, count = re.subn(place, lambda m, block=block: f"{m[1]}{block}\n{m[2]}", text, flags=re.DOTALL)
        if count != 1:
            raise ValueError(f"{page} needs one place <!-- {name} --> ... <!-- /{name} -->; received {count}.")
    page.write_text(text, encoding="utf-8")


def answer(results: Results, step_ms: float) -> str:
    """Up to where the exchange is below the threshold, and from where on groups of 8 save it."""
    largest, noise = max(results.ranks()), next(iter(results.waiting))[0]
    rows = []
    for platform in results.platforms():
        pays = results.pays_from(platform, noise, 8, step_ms)
        rows.append(
            (
                TITLES[platform],
                f"{results.ms(platform, largest, OURS):.1f} ms",
                f"{100 * results.waiting[noise, largest][largest] * step_ms / 100:.1f} ms",
                f"{results.quiet_until(platform, step_ms):,} ranks",
                f"{pays:,} ranks" if pays else f"none up to {largest:,}",
            )
        )
    head = (
        "",
        f"exchange, {largest:,} ranks",
        f"waiting, {largest:,} ranks",
        f"exchange below {100 * THRESHOLD:.0f} % up to",
        f"`group_size=8` saves {100 * THRESHOLD:.0f} % from",
    )
    return _table(head, rows)


def exchange(results: Results) -> str:
    """Milliseconds a step."""
    columns = ("syncbn, node by node", "syncbn, recursive doubling", "torch, ring", "torch, best")
    rows = []
    for platform in results.platforms():
        for ranks in (n for n in SHOWN if n in results.ranks()):
            ms = [results.ms(platform, ranks, column) for column in columns]
            ratio = results.ms(platform, ranks, TORCHS) / results.ms(platform, ranks, OURS)
            rows.append((TITLES[platform], f"{ranks:,}", *map(_short, ms), _short(ratio)))
    return _table(("ms a step", "ranks", *columns, "best torch / best syncbn"), rows)


def sent(ranks: int) -> str:
    """What a rank puts into a step's messages and must receive."""
    rows = []
    for library in ("syncbn", "torch"):
        messages = [f"{library} {way}" for way in ("forward", "backward")]
        one = sum(n * wires.message_bytes(message, C) for message in messages for C, n in wires.widths().items())
        rows.append((library, f"{one / 1e6:.2f} MB", f"{sum(wires.received(m, ranks) for m in messages) / 1e6:.1f} MB"))
    return _table(("a step of ResNet-50", "messages of a rank", f"least received by a rank, {ranks:,} ranks"), rows)


def waiting(results: Results, ranks: int) -> str:
    """What waiting adds to a step."""
    rows = []
    for noise, row in added_at(results.waiting, ranks).items():
        rows.append((noise, *(f"{100 * row[group]:.1f} %" for group in (1, *(g for g in GROUPS if g < ranks), ranks))))
    heads = [f"groups of {g}" for g in GROUPS if g < ranks]
    return _table((f"noise, {ranks:,} ranks", "once a step", *heads, "all ranks"), rows)


def groups(results: Results, step_ms: float) -> str:
    """From how many ranks on groups save the threshold, and what they save at the most ranks."""
    rows, largest = [], max(results.ranks())
    for platform in results.platforms():
        for noise in dict.fromkeys(noise for noise, _ in results.waiting):
            cells = []
            for group in (g for g in GROUPS if g < largest):
                pays = results.pays_from(platform, noise, group, step_ms)
                saved = results.saved(platform, noise, largest, group, step_ms)
                cells += [f"{pays:,}" if pays else "-", f"{100 * saved:.1f} %"]
            rows.append((TITLES[platform], noise, *cells))
    heads = [[f"groups of {g} save 5 % from", f"they save at {largest:,}"] for g in GROUPS if g < largest]
    return _table(("", "noise", *(word for pair in heads for word in pair)), rows)


def checks(results: Results) -> str:
    """The shortcuts beside what they stand for."""
    rows = [
        (c.shortcut, TITLES[c.platform], c.ranks, f"{c.taken:.2f} {c.unit}", f"{c.checked:.2f} {c.unit}")
        for c in results.checks
    ]
    return _table(("shortcut", "platform", "ranks", "taken", "checked"), rows)


def _short(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def _table(head: tuple[str, ...], rows: list[tuple[object, ...]]) -> str:
    return tabulate(rows, head, tablefmt="github", disable_numparse=True)
