# SPDX-License-Identifier: BSD-3-Clause
"""A canvas that writes small SVG files: text stays text, the ground is transparent, colours come from a theme."""

from __future__ import annotations

import base64
import math
import re
import struct
import zlib
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

WIDTH = 520
"""Of every picture: a phone shows it at 0.7 of its size, so text of 13 is 9 pixels high there."""
TEXT, SMALL = 14, 13
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', 'DejaVu Sans', sans-serif"
THEMES = {
    "light": {
        "ink": "#24292f",
        "muted": "#57606a",
        "grid": "#d0d7de",
        "fill": "#eef1f4",
        "blue": "#0072b2",
        "pale": "#7fb8dc",
        "orange": "#d55e00",
        "gray": "#8c959f",
        "green": "#00875f",
        "band": "#c3cad2",
        "on_blue": "#ffffff",
        "ground": "#ffffff",
    },
    "dark": {
        "ink": "#e6edf3",
        "muted": "#a5adb6",
        "grid": "#454c55",
        "fill": "#30363f",
        "blue": "#56b4e9",
        "pale": "#2b76a8",
        "orange": "#ff8c42",
        "gray": "#8f98a3",
        "green": "#3fc394",
        "band": "#5d6671",
        "on_blue": "#10141a",
        "ground": "#22262e",
    },
}
"""Colours by name. Ground is what lies under the transparent picture."""


class Canvas:
    """What is drawn so far.

    Args:
        height: in pixels; the width is WIDTH.
        theme: light or dark.
        title: what the picture says, for readers who do not see it.
    """

    def __init__(self, height: int, theme: str, title: str) -> None:
        self.height, self.colours, self.title = height, THEMES[theme], title
        self._parts: list[str] = []

    def text(
        self,
        x: float,
        y: float,
        words: str,
        *,
        size: float = TEXT,
        colour: str = "ink",
        anchor: str = "start",
        bold: bool = False,
        turned: bool = False,
    ) -> None:
        """Writes a line of text; ``turned`` reads upwards."""
        more = f' font-size="{size:g}"' if size != TEXT else ""
        more += f' text-anchor="{anchor}"' if anchor != "start" else ""
        more += ' font-weight="600"' if bold else ""
        more += f' transform="rotate(-90 {x:g} {y:g})"' if turned else ""
        self._add(f'<text x="{_n(x)}" y="{_n(y)}" fill="{self.colours[colour]}"{more}>{escape(words)}</text>')

    def line(self, points: Iterable[tuple[float, float]], colour: str, *, width: float = 1, dash: str = "") -> None:
        """Draws a line through points."""
        path = " ".join(f"{_n(x)},{_n(y)}" for x, y in points)
        more = f' stroke-dasharray="{dash}"' if dash else ""
        stroke = f'stroke="{self.colours[colour]}" stroke-width="{width:g}"{more}'
        self._add(f'<polyline points="{path}" fill="none" {stroke} stroke-linejoin="round"/>')

    def arrow(self, x0: float, y0: float, x1: float, y1: float, colour: str = "muted") -> None:
        """Draws a line that ends in a head."""
        long = math.hypot(x1 - x0, y1 - y0)
        dx, dy = (x1 - x0) / long, (y1 - y0) / long
        self.line([(x0, y0), (x1 - 5 * dx, y1 - 5 * dy)], colour, width=1.5)
        corners = [(x1, y1), *((x1 - 7 * dx - s * 3.5 * dy, y1 - 7 * dy + s * 3.5 * dx) for s in (1, -1))]
        path = " ".join(f"{_n(x)},{_n(y)}" for x, y in corners)
        self._add(f'<polygon points="{path}" fill="{self.colours[colour]}"/>')

    def box(
        self, x: float, y: float, width: float, height: float, colour: str, *, edge: str = "", round_: float = 0
    ) -> None:
        """Draws a rectangle."""
        more = f' stroke="{self.colours[edge]}"' if edge else ""
        more += f' rx="{round_:g}"' if round_ else ""
        place = f'x="{_n(x)}" y="{_n(y)}" width="{_n(width)}" height="{_n(height)}"'
        self._add(f'<rect {place} fill="{self.colours[colour]}"{more}/>')

    def dot(self, x: float, y: float, radius: float, colour: str) -> None:
        """Draws a disc."""
        self._add(f'<circle cx="{_n(x)}" cy="{_n(y)}" r="{radius:g}" fill="{self.colours[colour]}"/>')

    def square(self, x: float, y: float, radius: float, colour: str) -> None:
        """Draws a square around a point."""
        self.box(x - radius, y - radius, 2 * radius, 2 * radius, colour)

    def pixels(self, x: float, y: float, side: float, rows: Sequence[Sequence[int]], palette: Sequence[str]) -> None:
        """Draws an image, each number a colour of the palette, ``#rrggbb``, with edges as they are."""
        data = base64.b64encode(png(rows, palette)).decode()
        place = f'x="{_n(x)}" y="{_n(y)}" width="{_n(side)}" height="{_n(side)}"'
        self._add(f'<image {place} style="image-rendering:pixelated" href="data:image/png;base64,{data}"/>')

    def legend(self, x: float, y: float, entries: Iterable[tuple[str, str, float]]) -> None:
        """Writes names behind small boxes of their colours, each with the room that it takes."""
        for name, colour, room in entries:
            self.box(x, y - 10, 11, 11, colour)
            self.text(x + 16, y, name, size=SMALL)
            x += room

    def render(self) -> str:
        """Returns the file."""
        head = f'width="{WIDTH}" height="{self.height}" viewBox="0 0 {WIDTH} {self.height}"'
        look = f'font-family="{FONT}" font-size="{TEXT}"'
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" {head} {look} role="img">',
                f"<title>{escape(self.title)}</title>",
                *self._parts,
                "</svg>\n",
            ]
        )

    def _add(self, part: str) -> None:
        self._parts.append(part)


class Scale:
    """Maps numbers between two bounds to pixels between two others.

    Args:
        low: the number at ``start``.
        high: the number at ``end``.
        start: a pixel.
        end: a pixel.
        log: whether equal ratios, not equal differences, are equally long.
    """

    def __init__(self, low: float, high: float, start: float, end: float, *, log: bool = False) -> None:
        self._low, self._high, self._start, self._end, self._log = low, high, start, end, log

    def __call__(self, value: float) -> float:
        """Returns the pixel of a number; of one outside, the nearer end."""
        value = min(max(value, min(self._low, self._high)), max(self._low, self._high))
        of: Callable[[float], float] = math.log if self._log else float
        part = (of(value) - of(self._low)) / (of(self._high) - of(self._low))
        return self._start + part * (self._end - self._start)


def axes(
    canvas: Canvas,
    sides: tuple[float, float, float],
    x: tuple[Scale, Iterable[tuple[float, str]]],
    y: tuple[Scale, Iterable[tuple[float, str]]],
) -> None:
    """Draws the lines and numbers of two scales below and left of a plot with these left, right and bottom sides."""
    left, right, bottom = sides
    for value, name in y[1]:
        at = y[0](value)
        canvas.line([(left, at), (right, at)], "grid")
        canvas.text(left - 6, at + 4.5, name, size=SMALL, colour="muted", anchor="end")
    for value, name in x[1]:
        at = x[0](value)
        canvas.line([(at, bottom), (at, bottom + 4)], "gray")
        canvas.text(at, bottom + 18, name, size=SMALL, colour="muted", anchor="middle")
    canvas.line([(left, bottom), (right, bottom)], "gray")


def png(rows: Sequence[Sequence[int]], palette: Sequence[str]) -> bytes:
    """Encodes an image of a palette of up to 256 colours, ``#rrggbb``."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", len(rows[0]), len(rows), 8, 3, 0, 0, 0)
    colours = b"".join(bytes.fromhex(colour[1:]) for colour in palette)
    lines = b"".join(b"\0" + bytes(row) for row in rows)
    parts = ((b"IHDR", head), (b"PLTE", colours), (b"IDAT", zlib.compress(lines, 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def write(folder: Path, name: str, draw: Callable[[str], Canvas]) -> list[Path]:
    """Writes a picture for both themes and returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for theme in THEMES:
        paths.append(folder / f"{name}-{theme}.svg")
        paths[-1].write_text(draw(theme).render(), encoding="utf-8")
    return paths


def shrunk(text: str) -> str:
    """Returns an SVG of matplotlib without metadata, with fewer digits and the font's family once."""
    text = re.sub(r"\s*<metadata>.*?</metadata>|\s*<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r"; font-family: [^;\"]*", "", text)
    text = re.sub(r"(<use [^>]*?) style=\"fill: (#\w+)[^\"]*\"", r'\1 fill="\2"', text)  # its path has the rest
    text = re.sub(r"(<use [^>]*?) style=\"[^\"]*\"", r"\1", text)
    text = text.replace('<style type="text/css">', f'<style type="text/css">text{{font-family: {FONT}}}')
    text = re.sub(r"<[^>]*>", lambda tag: re.sub(r"\d+\.\d{2,}", lambda number: _n(number[0]), tag[0]), text)
    return re.sub(r"\s*\n\s*(?=[LQCz\"])", " ", text)


def _n(value: Any) -> str:
    return f"{round(float(value), 1):g}"
