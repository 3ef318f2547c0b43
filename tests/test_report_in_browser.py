"""A report as a browser shows it: Chromium, headless, at the width of a desk and of a phone."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sae_pipe.stages.evaluation.results import read_results
from sae_pipe.stages.report import Options, write_report

from .browser import Page, browser, find_chromium
from .reporting import fit_two, results_of

CHROMIUM = find_chromium()
pytestmark = pytest.mark.skipif(
    CHROMIUM is None,
    reason="no Chromium: `apt-get install chromium` (Debian) brings one",
)

DESK, PHONE = (1280, 900), (390, 844)
SIZES = pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
SCHEMES = pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])

# Everything that reaches out of the window and is not inside a box that scrolls by itself.
TOO_WIDE = """
[...document.body.querySelectorAll("*")].filter(element => {
  const box = element.getBoundingClientRect();
  return box.width && box.right > innerWidth + 1 && !element.closest(".scroll, pre, svg, .skip");
}).map(element => element.tagName + "." + element.className)
"""

# Contrast of every text with what is behind it (WCAG 2, relative luminance).
LOW_CONTRAST = """
(() => {
  const parse = text => {
    const parts = text.match(/[\\d.]+/g).map(Number);
    return {rgb: parts.slice(0, 3), alpha: parts.length > 3 ? parts[3] : 1};
  };
  const over = (top, below) => top.rgb.map((v, i) => v * top.alpha + below[i] * (1 - top.alpha));
  const behind = element => {
    const layers = [];
    for (let each = element; each; each = each.parentElement)
      layers.push(parse(getComputedStyle(each).backgroundColor));
    return layers.reverse().reduce((below, layer) => over(layer, below), [255, 255, 255]);
  };
  const luminance = rgb => {
    const [r, g, b] = rgb.map(v => v / 255).map(
      v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || element.closest("title, desc, style, [aria-hidden]"))
      continue;
    const style = getComputedStyle(element);
    const colour = parse(element.closest("svg") ? style.fill : style.color);
    const below = behind(element);
    const [a, b] = [luminance(over(colour, below)), luminance(below)];
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (contrast < 4.5) found.push([contrast.toFixed(2), walker.currentNode.data.trim().slice(0, 30)]);
  }
  return found;
})()
"""


@pytest.fixture(scope="module")
def report(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = fit_two(store, tmp_path_factory.mktemp("runs"))
    results = results_of(runs, tmp_path_factory.mktemp("results"))
    out = tmp_path_factory.mktemp("report") / "report"
    write_report(read_results([results]), out, options=Options(latents=4, examples=3))
    return out


@pytest.fixture(scope="module")
def files(report: Path) -> list[Path]:
    """The first page, and one of latents."""
    return [report / "index.html", min(report.glob("latents/*.html"))]


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    assert CHROMIUM is not None
    with browser(CHROMIUM) as opened:
        yield opened


def unfolded(page: Page) -> None:
    page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")


@SIZES
@SCHEMES
def test_a_page_is_quiet_and_asks_for_itself_alone(
    page: Page, files: list[Path], size: tuple[int, int], dark: bool
) -> None:
    for file in files:
        page.view(*size, mobile=size == PHONE, dark=dark)
        page.open(file)
        assert page.complaints() == []
        assert [url for url in page.requests() if not url.startswith("data:")] == [
            file.resolve().as_uri()
        ]


@SIZES
def test_nothing_is_wider_than_the_window(
    page: Page, files: list[Path], size: tuple[int, int]
) -> None:
    for file in files:
        page.view(*size, mobile=size == PHONE)
        page.open(file)
        unfolded(page)
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= size[0], page.evaluate(TOO_WIDE)
        assert page.evaluate(TOO_WIDE) == []
        wide_tables = page.evaluate(
            "[...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth)"
            ".every(e => e.tabIndex === 0 && getComputedStyle(e).overflowX === 'auto')"
        )
        assert wide_tables


@SIZES
def test_every_picture_is_drawn_large_enough_to_read(
    page: Page, files: list[Path], size: tuple[int, int]
) -> None:
    for file in files:
        page.view(*size, mobile=size == PHONE)
        page.open(file)
        unfolded(page)
        sizes = page.evaluate(
            "[...document.querySelectorAll('svg')].map(e => { const b = e.getBoundingClientRect();"
            " return [b.width, b.height]; })"
        )
        assert len(sizes) > 3
        assert all(width > 200 and height > 80 for width, height in sizes)
        texts = page.evaluate(
            "[...document.querySelectorAll('svg text')].map("
            "e => parseFloat(getComputedStyle(e).fontSize)"
            " * Math.hypot(e.getScreenCTM().a, e.getScreenCTM().b))"
        )
        assert min(texts) > 7.5  # pixels; the letters of an axis with 26 of them
        marks = page.evaluate(
            "document.querySelectorAll('svg use, svg path[style*=series]').length"
        )
        assert marks > 0


@SCHEMES
def test_texts_stand_out_from_what_is_behind_them(
    page: Page, files: list[Path], dark: bool
) -> None:
    for file in files:
        page.view(*DESK, dark=dark)
        page.open(file)
        unfolded(page)
        assert page.evaluate(LOW_CONTRAST) == []
    page.evaluate("document.querySelector('h2').style.color = '#888'")
    assert len(page.evaluate(LOW_CONTRAST)) == (0 if dark else 1)  # it does find what is there


def test_the_page_is_used_without_a_mouse(page: Page, files: list[Path]) -> None:
    page.view(*DESK)
    page.open(files[0])
    page.press("Tab")
    focused = "document.activeElement.textContent.trim().slice(0, 40)"
    assert page.evaluate(focused) == "Skip to the content"
    assert (
        page.evaluate("document.activeElement.getBoundingClientRect().top") >= 0
    )  # shown on focus
    page.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    order: list[Any] = []
    for _ in range(12):
        page.press("Tab")
        order.append(
            page.evaluate(
                "[document.activeElement.tagName, getComputedStyle(document.activeElement).outlineStyle]"
            )
        )
    tags = [tag for tag, _ in order]
    assert "SUMMARY" in tags
    assert "DIV" in tags  # a table that scrolls
    assert {outline for _, outline in order} == {"solid"}
    page.evaluate("document.querySelector('summary').focus()")
    page.press("Enter")
    assert page.evaluate("document.querySelector('details').open")


def test_a_run_leads_to_its_latents_and_back(page: Page, report: Path) -> None:
    page.view(*DESK)
    page.open(report / "index.html")
    page.events.clear()
    page.evaluate("document.querySelector('#runs tbody a').click()")
    page.wait_for("Page.loadEventFired")
    assert page.evaluate("document.title").startswith("Latents of acts-topk")
    shades = page.evaluate("[...document.querySelectorAll('.context mark')].map(e => e.className)")
    assert any("a9" in shade for shade in shades)
    page.events.clear()
    page.evaluate("document.querySelector('nav a').click()")
    page.wait_for("Page.loadEventFired")
    assert page.evaluate("document.title").startswith("Sparse autoencoders of neox-pd")


def test_screenshots_for_who_wants_to_look(page: Page, files: list[Path], tmp_path: Path) -> None:
    """Kept where REPORT_SCREENSHOTS says, if it does."""
    folder = Path(os.environ.get("REPORT_SCREENSHOTS", tmp_path))
    for name, size in (("desk", DESK), ("phone", PHONE)):
        page.view(*size, mobile=size == PHONE)
        for number, file in enumerate(files):
            page.open(file)
            shot = folder / f"{name}-{number}.png"
            page.screenshot(shot)
            assert shot.read_bytes().startswith(b"\x89PNG")
            assert shot.stat().st_size > 20_000, json.dumps([name, number])
