# SPDX-License-Identifier: BSD-3-Clause
"""The pages of the site as a browser shows them: no page is wider than its window, and no code is cut on a wide one.

Needs the extra `browser` and a Chromium of this machine, and skips with the reason without. It downloads nothing.
"""

import importlib.util
import shutil

import pytest

from tests.project import pages

NARROW, WIDE, HIGH = 390, 1440, 900
COLORS = ("light", "dark")
NAMES = [page.name for page in pages.every()]
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
pytestmark = [pytest.mark.program, pytest.mark.xdist_group("site")]

# What is folded or behind a tab counts, too.
UNFOLD = """() => {
    document.querySelectorAll("details").forEach(each => each.open = true);
    document.querySelectorAll(".tabbed-block").forEach(each => each.style.display = "block");
}"""
WIDTH = "() => [document.documentElement.scrollWidth, document.body.scrollWidth]"
# Code and tables that have to be moved to be read, by their first words.
CUT = """() => {
    const right = each => each.getBoundingClientRect().right;
    const end = right(document.querySelector(".md-content__inner"));
    return [...document.querySelectorAll("pre > code, .md-content table, .md-content img")]
        .filter(each => each.clientWidth && (each.scrollWidth > each.clientWidth + 1 || right(each) > end + 1))
        .map(each => (each.textContent || each.alt || each.src).trim().slice(0, 60));
}"""


@pytest.fixture(scope="module")
def browser():
    if not importlib.util.find_spec("playwright"):
        pytest.skip('needs playwright: pip install "syncbn[browser]"')
    found = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if not found:
        pytest.skip(f"needs a Chromium on the PATH: {', '.join(CHROMIUM)}")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser.new_page()
        browser.close()


def open_page(browser, site, name):
    path = site.folder / name.removesuffix("index") / "index.html"
    browser.emulate_media(color_scheme="light")
    browser.set_viewport_size({"width": WIDE, "height": HIGH})
    browser.goto(path.as_uri())
    browser.evaluate(UNFOLD)


@pytest.mark.parametrize("name", NAMES)
def test_a_page_fits_its_window_wide_and_narrow_light_and_dark(browser, site, name):
    open_page(browser, site, name)
    assert browser.evaluate(CUT) == []
    for colors, width in (("light", WIDE), ("light", NARROW), ("dark", NARROW), ("dark", WIDE)):
        browser.emulate_media(color_scheme=colors)
        browser.set_viewport_size({"width": width, "height": HIGH})
        assert max(browser.evaluate(WIDTH)) <= width, f"{colors}, {width} pixels"


def test_what_is_too_wide_is_found(browser, site):
    open_page(browser, site, "index")
    browser.evaluate("""() => document.querySelector("pre > code").textContent = "wide_".repeat(50)""")
    browser.evaluate("""() => document.querySelector("pre > code").style.whiteSpace = "pre" """)
    assert browser.evaluate(CUT) == ["wide_" * 12]
    browser.evaluate("""() => document.querySelector("h1").style.width = "2000px" """)
    assert max(browser.evaluate(WIDTH)) > WIDE


def test_colors_are_those_of_the_system(browser, site):
    open_page(browser, site, "index")
    shown = []
    for colors in COLORS:
        browser.emulate_media(color_scheme=colors)
        browser.goto((site.folder / "index.html").as_uri())
        shown.append(browser.evaluate("() => getComputedStyle(document.body).backgroundColor"))
    light, dark = (sum(int(part) for part in color.strip("rgba()").split(",")[:3]) for color in shown)
    assert light > 3 * 200 > 3 * 80 > dark
