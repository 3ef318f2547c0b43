"""What reports are put together from: their folder, pictures, shades, groups."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae_pipe.stages.compare.choose import judgements_of
from sae_pipe.stages.compare.intervals import Estimate
from sae_pipe.stages.report import write_report
from sae_pipe.stages.report.build import kept_together
from sae_pipe.stages.report.contexts import LEVELS, level_of, visible
from sae_pipe.stages.report.figures import Curve, beyond, span
from sae_pipe.stages.report.folder import check_place, page_name, write_pages
from sae_pipe.stages.report.groups import Groups, baseline_group
from sae_pipe.stages.report.svg import SERIES, draw
from sae_pipe.storage.errors import InputError

from .judging import experiment, with_facts

# --- the folder ---


def test_a_folder_that_is_no_report_is_refused_and_left_alone(tmp_path: Path) -> None:
    made_up = experiment(tmp_path, seeds=(0,), ks=(4,))
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "index.html").write_text("mine")
    (other / "report.json").write_text('{"format": "something else"}')
    with pytest.raises(InputError, match=re.escape(
        f"{other} exists and is not a report of sae-pipe. Pass another --out, or move it away."
    )):  # fmt: skip
        write_report(made_up, other)
    assert (other / "index.html").read_text() == "mine"
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(InputError, match="is not a report of sae-pipe"):
        check_place(file)
    (tmp_path / "empty").mkdir()
    check_place(tmp_path / "empty")


def test_a_report_is_written_over_by_the_next_and_old_pages_go(tmp_path: Path) -> None:
    out = tmp_path / "report"
    write_pages(out, {"index.html": "1", "latents/a.html": "a", "latents/b.html": "b"})
    (out / "notes.txt").write_text("mine")
    (out / ".index.html.123.tmp").write_text("half")  # of a writer that was killed
    write_pages(out, {"index.html": "2", "latents/b.html": "b2"})
    names = sorted(str(file.relative_to(out)) for file in out.rglob("*") if file.is_file())
    assert names == ["index.html", "latents/b.html", "notes.txt", "report.json"]
    assert (out / "index.html").read_text() == "2"


def test_a_marker_cannot_have_other_files_removed(tmp_path: Path) -> None:
    out, precious = tmp_path / "report", tmp_path / "precious.html"
    precious.write_text("mine")
    write_pages(out, {"index.html": "1"})
    marker = (out / "report.json").read_text()
    (out / "report.json").write_text(
        marker.replace('"index.html"', '"../precious.html", "latents/../../precious.html"')
    )
    write_pages(out, {"index.html": "2"})
    assert precious.read_text() == "mine"


@given(st.text(), st.text())
def test_names_of_pages_are_plain_whatever_a_run_is_called(name: str, digest: str) -> None:
    found = page_name(name, digest, {})
    assert re.fullmatch(r"latents/[A-Za-z0-9_.-]+\.html", found)
    assert ".." not in found.removeprefix("latents/")[:2]
    assert page_name(name, digest, {found: 1}) != found


# --- pieces ---


@given(st.floats(allow_nan=True), st.floats(1e-6, 1e6))
def test_shades_follow_the_share_of_the_largest(value: float, largest: float) -> None:
    level = level_of(value, largest)
    if not value > 0:
        assert level == 0
    else:
        assert 1 <= level <= LEVELS
        assert level == LEVELS or value <= largest * level / LEVELS * (1 + 1e-9)


def test_line_breaks_are_a_sign_and_control_characters_are_escaped() -> None:
    assert visible(["a\r\n", "b\n", "\x1b[1m"]) == "a↵b↵\\x1b[1m"


def test_numbers_and_what_belongs_to_them_stay_together() -> None:
    assert kept_together("at L0 20, p = 0.3, 95 % of") == (
        "at L0\N{NO-BREAK SPACE}20, p\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}0.3, "
        "95\N{NO-BREAK SPACE}% of"
    )


def test_a_picture_is_text_and_colours_of_the_page_and_the_same_every_time() -> None:
    def paint(figure: Any) -> None:
        axes = figure.subplots()
        axes.plot([1, 2], [3, 4], "o-", color=SERIES[2])
        axes.set_ylabel("a <b> $x$ 漢字")

    def picture() -> str:
        return draw(paint, name="one", title="A & B", description="1 < 2")

    svg = picture()
    assert svg == picture()
    assert '<title id="one-t">A &amp; B</title><desc id="one-d">1 &lt; 2</desc>' in svg
    assert "a &lt;b&gt; $x$ 漢字</text>" in svg
    assert "var(--series-2)" in svg
    assert not re.search(r"#[0-9a-f]{6}\b", svg)
    assert "font-family" not in svg
    assert all(found.startswith("one-") for found in re.findall(r'id="([^"]+)"', svg))


def test_a_baseline_far_away_is_said_and_does_not_stretch_the_picture() -> None:
    run_group = replace(baseline_group("x"), slot=0, label="p = 0.3")
    near = Curve(group=run_group, points=[(10, Estimate(value=0.6)), (20, Estimate(value=0.8))])
    far = Curve(
        group=baseline_group("untrained"),
        points=[(10, Estimate(value=-5)), (20, Estimate(value=0.5))],
    )
    low, high = span([near, far])
    assert 0.4 < low < 0.5
    assert 0.8 < high < 0.9
    assert beyond([near, far]) == "Beyond the picture: untrained -5.00 at L0 10."
    assert beyond([near]) == ""


def test_groups_are_named_by_what_differs_and_told_apart_without_colour(tmp_path: Path) -> None:
    made_up = experiment(tmp_path, seeds=(0,), ks=(4,))
    one = Groups.of(judgements_of(made_up)[:2]).all
    assert [group.label for group in one] == ["without mask", "p = 0.3"]
    assert len({group.slot for group in one}) == 2
    assert len({group.glyph for group in one}) == 2
    both = [*made_up, *(with_facts(r, arch="topk", name=f"topk {r.name}") for r in made_up)]
    runs = [each for each in judgements_of(both) if each.baseline is None]
    four = Groups.of(runs).all
    assert [group.label for group in four] == [
        "matryoshka, without mask", "matryoshka, p = 0.3", "topk, without mask", "topk, p = 0.3",
    ]  # fmt: skip
    assert len({group.glyph for group in four}) == 4
    assert len({group.slot for group in four}) == 2
    (only,) = Groups.of(runs[:1]).all
    assert only.label == "matryoshka, without mask"
