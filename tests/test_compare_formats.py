"""A comparison as text: every format, hostile names, and the command."""

import csv
import io
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from sae_pipe.pipeline.cli import app
from sae_pipe.stages.compare import FORMATS, compare, render
from sae_pipe.stages.compare.facts import label, sort_key
from sae_pipe.stages.compare.formats import csv as csv_format
from sae_pipe.stages.compare.formats import latex, markdown
from sae_pipe.stages.compare.grid import number, signed
from sae_pipe.stages.evaluation.results import Result, read_results
from sae_pipe.storage.errors import InputError, StoreError

from .judging import experiment, with_facts, write_all

OUT = Path("results")


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_writes_every_number_and_ends_in_a_newline(form: str) -> None:
    text = render(compare(experiment(OUT)), form)
    assert text.endswith("\n")
    assert "absorption" in text
    assert "90.05" in text


def test_an_unknown_format_lists_the_known_ones() -> None:
    with pytest.raises(InputError, match=re.escape(
        "Unknown format 'html': choose one of terminal, markdown, csv, latex."
    )):  # fmt: skip
        render(compare(experiment(OUT)), "html")


HOSTILE = 'a|b_{c}$&%#~^\\<script>alert("x")</script>*`\n\x1b[31m'


def hostile() -> list[Result]:
    return [with_facts(r, arch=HOSTILE) for r in experiment(OUT, ks=(20,))]


def test_markdown_of_a_hostile_name_keeps_the_cells_of_the_table() -> None:
    text = render(compare(hostile(), ["mask_p", "arch"]), "markdown")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1
    assert "<script" not in text.replace(r"\<", "")
    assert "\x1b" not in text
    assert markdown.escaped("a_b|c") == r"a\_b\|c"


def test_latex_of_a_hostile_name_has_no_command_of_it() -> None:
    text = render(compare(hostile()), "latex")
    assert r"a\textbar{}b\_\{c\}\$\&\%\#\textasciitilde{}\textasciicircum{}\textbackslash{}" in text
    assert text.count("{") - text.count(r"\{") == text.count("}") - text.count(r"\}")
    assert latex.escaped("50 % ↑") == r"50 \% $\uparrow$"


def test_csv_gives_back_what_was_put_in() -> None:
    comparison = compare(hostile(), ["mask_p", "arch"])
    rows = list(csv.DictReader(io.StringIO(render(comparison, "csv"))))
    assert {row["arch"] for row in rows} == {HOSTILE}
    masked = next(r for r in rows if (r["value_name"], r["mask_p"]) == ("mean_full", "0.3"))
    found = comparison.lines[0].differences[0.3]
    assert float(masked["difference_low"]) == found.low
    assert masked["excludes_zero"] == "True"
    assert {row["baseline"] for row in rows} == {"", "untrained"}


def test_csv_makes_no_formula_of_a_text() -> None:
    assert csv_format.safe("=1+1") == "'=1+1"
    assert csv_format.safe(-0.5) == -0.5


def test_terminal_text_stars_what_is_bold_elsewhere_and_aligns_digits() -> None:
    text = render(compare(hostile()), "terminal")
    assert "\x1b" not in text
    table = text.split("\n\n")[0].splitlines()[3:]
    assert sum("*" in line for line in table) == 2  # absorption and l0
    assert "Starred: the interval excludes 0" in " ".join(text.split())
    places = {line.index("88.05") for line in table if "88.05" in line}
    places |= {line.index("20.00") for line in table if line.startswith("l0")}
    assert len(places) == 1


@given(st.floats(-1e300, 1e300), st.integers(0, 4))
def test_numbers_are_shown_with_their_sign_and_never_as_a_false_zero(
    value: float, digits: int
) -> None:
    text = number(value, digits)
    shown = float(text.replace(",", ""))
    assert (shown == 0) == (value == 0) or abs(value) < 1e-300
    assert shown == pytest.approx(value, rel=0.01, abs=0.51 * 10.0**-digits)
    with_sign = signed(value, digits)
    assert with_sign[0] == ("-" if value < 0 else "+")
    assert float(with_sign.replace(",", "")) == pytest.approx(
        value, rel=0.01, abs=0.51 * 10.0**-digits
    )


def test_values_of_keys_are_in_order_and_named_as_in_the_paper() -> None:
    assert sorted([0.3, None, "topk", 0.0, "relu", 10], key=sort_key) == [
        0.0,
        0.3,
        10,
        "relu",
        "topk",
        None,
    ]
    assert label("mask_p", 0.0) == "without mask"
    assert label("mask_p", 0.3) == "p = 0.3"
    assert label("k", 20) == "L0 20"


# --- the command ---


def run(*args: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, [str(arg) for arg in args])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stdout, done.stderr


def test_the_command_reads_folders_and_files_and_writes_a_file(tmp_path: Path) -> None:
    folder = write_all(experiment(tmp_path / "results"))
    code, stdout, _ = run("compare", folder)
    assert code == 0
    assert stdout == render(compare(read_results([folder])), "terminal")
    out = tmp_path / "table.tex"
    code, stdout, _ = run(
        "compare", *sorted(folder.glob("*.json")), "--by", "mask_p, l0", "--metrics", "l0",
        "--format", "latex", "--out", out,
    )  # fmt: skip
    assert (code, stdout) == (0, f"Wrote {out}.\n")
    assert out.read_text() == render(
        compare(read_results([folder]), ["mask_p", "l0"], metrics=["l0"]), "latex"
    )


def test_the_command_says_in_one_sentence_what_is_wrong(tmp_path: Path) -> None:
    folder = write_all(experiment(tmp_path / "results", ks=(20,)))
    code, _, stderr = run("compare", folder, "--by", "width")
    assert code == 2
    assert stderr.startswith("Error: --by 'width' is not known. These results have l0, name,")
    assert run("compare", tmp_path / "nowhere")[0] == 2
    damaged = next(folder.glob("*.json"))
    damaged.write_text("{")
    with pytest.raises(StoreError, match="is damaged: it is not JSON"):
        read_results([damaged])
