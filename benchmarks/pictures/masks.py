# SPDX-License-Identifier: BSD-3-Clause
"""What the two networks of examples/segmentation.py make of four pictures, as benchmarks/pictures/segment.py found."""

from __future__ import annotations

from benchmarks.pictures import results
from benchmarks.pictures.svg import SMALL, THEMES, WIDTH, Canvas

SIDE, GAP, TOP = 124, 8, 84
COLUMNS = {"picture": "picture", "truth": "truth", "BatchNorm2d": "BatchNorm2d", "SyncBatchNorm": "SyncBatchNorm"}
GRAYS = tuple(f"#{value:02x}{value:02x}{value:02x}" for value in range(256))
TITLE = (
    "Four pictures of two materials, one dark, one bright. With BatchNorm2d the network takes all for the dark one; "
    "with SyncBatchNorm it tells them apart."
)


def draw(theme: str) -> Canvas:
    """Draws a row for each picture: the picture, the truth, and what each network says."""
    document = results.read("segmentation")
    pictures = [bytes.fromhex(text) for text in document["pictures"]]
    side = len(document["classes"]["truth"][0])
    canvas = Canvas(TOP + len(pictures) * (SIDE + GAP), theme, TITLE)
    palette = [THEMES[theme][name] for name in ("fill", "blue", "orange")]
    canvas.legend(
        2, 16, (("dark material", "blue", 128), ("bright material", "orange", 138), ("background", "fill", 90))
    )
    for column, name in enumerate(COLUMNS):
        left = column * (SIDE + GAP)
        canvas.text(left + SIDE / 2, 46, name, anchor="middle", bold=True)
        if name in document["IoU"]:
            dark, bright = document["IoU"][name].values()
            canvas.text(left + SIDE / 2, 66, f"IoU {dark:.2f}, {bright:.2f}", anchor="middle", size=SMALL)
        elif name == "truth":
            canvas.text(left + SIDE, 66, "IoU dark, bright:", anchor="end", size=SMALL, colour="muted")
        for row, gray in enumerate(pictures):
            top = TOP - 6 + row * (SIDE + GAP)
            if name == "picture":
                rows = [gray[i * side : (i + 1) * side] for i in range(side)]
                canvas.pixels(left, top, SIDE, [[value & 0xF0 for value in line] for line in rows], GRAYS)
            else:
                classes = [[int(digit) for digit in line] for line in document["classes"][name][row]]
                canvas.pixels(left, top, SIDE, classes, palette)
    assert left + SIDE <= WIDTH
    return canvas
