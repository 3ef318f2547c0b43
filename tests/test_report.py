"""Pages of a report: what stands in them, what they never hold, and the folder they are written to."""

import itertools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from sae_pipe.pipeline.cli import app
from sae_pipe.stages.compare import compare
from sae_pipe.stages.compare.choose import Series, judgements_of
from sae_pipe.stages.compare.headlines import HEADLINES
from sae_pipe.stages.evaluation.engine import EvalConfig, evaluate_runs
from sae_pipe.stages.evaluation.results import Result, read_results, write_result
from sae_pipe.stages.metrics import names_of
from sae_pipe.stages.report import Options, write_report
from sae_pipe.stages.report.contexts import LEVELS
from sae_pipe.stages.report.details import density_section, letters_section, ood_section
from sae_pipe.stages.report.groups import Groups
from sae_pipe.stages.report.page import LatentPages
from sae_pipe.stages.report.saes import absorption_roles
from sae_pipe.stages.sae import load_sae
from sae_pipe.storage import open_store
from sae_pipe.storage.errors import InputError

from .judging import experiment, with_details, with_facts
from .reporting import fit_two, results_of

VOID = {"meta", "link", "br", "wbr", "img", "hr", "input"}
EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>${7*7}{{7*7}}$x_y$ &amp; \x1b[31m"


class Parsed(HTMLParser):
    """A page as tags with attributes, and its text; balance of tags is checked on the way."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(source)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {key: value or "" for key, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def values(self, attribute: str) -> list[str]:
        return [attrs[attribute] for _, attrs in self.tags if attribute in attrs]

    def of(self, tag: str) -> list[dict[str, str]]:
        return [attrs for each, attrs in self.tags if each == tag]


@pytest.fixture(scope="module")
def runs(store: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return fit_two(store, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def results(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return results_of(runs, tmp_path_factory.mktemp("results"))


@pytest.fixture(scope="module")
def report(results: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report") / "report"
    write_report(read_results([results]), out, options=Options(latents=5, examples=3))
    return out


@pytest.fixture(scope="module")
def pages(report: Path) -> dict[str, Parsed]:
    files = sorted(report.rglob("*.html"))
    return {str(file.relative_to(report)): Parsed(file.read_text()) for file in files}


def with_little(results: Path) -> list[Result]:
    """The results with one metric each: few pictures, and a quick report."""
    return [replace(each, metrics=each.metrics[:1]) for each in read_results([results])]


# --- what stands in the pages ---


def test_every_section_is_there_with_its_pictures(pages: dict[str, Parsed]) -> None:
    index = pages["index.html"]
    ids = set(index.values("id"))
    assert {
        "glance", "table", "pareto", "masking", "absorption", "ood", "density", "runs", "definitions",
    } <= ids  # fmt: skip
    assert len(index.of("svg")) > 8
    for text in (
        "90_glue_qnli",
        "Never fired",
        "X: 12 words, and 20 are needed",
        "apple (latent 72",
    ):
        assert text in index.text


def test_numbers_of_the_table_are_those_of_compare(pages: dict[str, Parsed]) -> None:
    text = pages["index.html"].text.replace("\N{MINUS SIGN}", "-")
    text = " ".join(text.replace("\N{NO-BREAK SPACE}", " ").split())
    assert "explained variance ↑explained_variance 4 0.4678 0.4678 +0.0000 [-0.00" in text


def test_each_run_that_is_there_has_a_page_of_latents(
    pages: dict[str, Parsed], runs: list[Path]
) -> None:
    assert len(pages) == 1 + len(runs)
    index = pages["index.html"]
    for page in pages.keys() - {"index.html"}:
        assert page in index.values("href")
    assert (
        "No page of latents for acts-p0.3-l0_4-seed0: Its run folder /runs/acts-p0.3-l0_4-seed0 is "
        "not there. Pass where it is now as --runs."
    ) in " ".join(index.text.split()).replace("\N{NO-BREAK SPACE}", " ")


def test_shaded_tokens_are_real_activations_of_the_sae(
    report: Path, runs: list[Path], store: Path
) -> None:
    opened, sae = open_store(store), load_sae(runs[0])
    (file,) = report.glob(f"latents/{runs[0].name}-*.html")
    rows = torch.from_numpy(opened.heldout.read(0, opened.heldout.n_rows))
    latents_NS = np.asarray(sae.encode(rows))
    source = file.read_text()
    sections = re.findall(
        r'<section class="latent card" id="latent-(\d+)"(.*?)</section>', source, re.DOTALL
    )
    assert len(sections) >= 5
    for index, section in sections:
        values = latents_NS[:, int(index)]
        rows_shown = re.search(r"of the rows, ([\d,]+) in all", section)
        assert rows_shown is not None
        assert int(rows_shown[1].replace(",", "")) == (values > 0).sum()
        marks = re.findall(r'<mark class="a(\d)(?: peak)?" title="([^"]+)">', section)
        active = {f"{value:.3g}" for value in values[values > 0].tolist()}
        assert {value for _, value in marks} <= active
        if marks:
            assert max(marks, key=lambda mark: float(mark[1])) == (
                str(LEVELS), f"{values.max():.3g}",
            )  # fmt: skip


def test_words_lead_to_the_latents_that_carry_them(
    runs: list[Path], results: Path, tmp_path: Path
) -> None:
    found = read_results([results])
    carrier = 7  # there is one of 64; the made-up ones are beyond
    changed = []
    for each in found:
        entries = [
            replace(e, details={"concepts": [
                {"concept": "A", "words": 9, "main": [3], "full_absorption": 0.2,
                 "absorbed": [{"word": " apple", "latent": carrier, "share": 0.5}]},
            ]}) if e.metric == "absorption" else e
            for e in each.metrics
        ]  # fmt: skip
        changed.append(replace(each, metrics=tuple(entries)))
    write_report(changed, tmp_path / "report", options=Options(latents=1, examples=1))
    index = Parsed((tmp_path / "report/index.html").read_text())
    links = [href for href in index.values("href") if href.endswith(f"#latent-{carrier}")]
    assert len(links) == 2  # of the two runs that are there
    page = Parsed((tmp_path / "report" / links[0].split("#")[0]).read_text())
    assert f"latent-{carrier}" in page.values("id")
    assert "absorbs A" in page.text


# --- what no page ever holds ---


def test_pages_ask_for_nothing_and_run_nothing(pages: dict[str, Parsed]) -> None:
    for page in pages.values():
        assert not page.of("script")
        assert not page.values("src")
        assert not [k for _, attrs in page.tags for k in attrs if k.startswith("on")]
        for target in page.values("href"):
            assert re.fullmatch(r"#[\w-]+|(\.\./)?[\w./-]+\.html(#[\w-]+)?|data:,", target), target
        policy = next(a["content"] for a in page.of("meta") if "http-equiv" in a)
        assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def test_pages_are_sound_for_readers_of_every_kind(pages: dict[str, Parsed]) -> None:
    for page in pages.values():
        assert page.of("html") == [{"lang": "en"}]
        assert len(page.of("title")) >= 1
        assert len(page.of("h1")) == 1
        assert page.of("a")[0] == {"class": "skip", "href": "#main"}
        assert [n for n, count in Counter(page.values("id")).items() if count > 1] == []
        ids = set(page.values("id"))
        for references in page.values("aria-labelledby"):
            assert set(references.split()) <= ids
        for svg in page.of("svg"):
            assert svg["role"] == "img"
            assert "aria-labelledby" in svg
        for box in page.of("div") + page.of("pre"):
            if box.get("role") == "region":  # scrolls: has a name, and is reached by keyboard
                assert box["tabindex"] == "0"
                assert box.get("aria-label") or box.get("aria-labelledby")
        headings = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
        assert all(after <= before + 1 for before, after in itertools.pairwise(headings))


def test_every_link_leads_somewhere(report: Path, pages: dict[str, Parsed]) -> None:
    for name, page in pages.items():
        for target in page.values("href"):
            path, _, anchor = target.partition("#")
            if path == "data:,":
                continue
            other = (
                str((report / name).parent.joinpath(path).resolve().relative_to(report.resolve()))
                if path
                else name
            )
            assert other in pages, target
            assert not anchor or anchor in pages[other].values("id")


def hostile(results: Sequence[Result]) -> list[Result]:
    """Every text of the results is an attack."""
    changed = []
    for each in results:
        facts: dict[str, Any] = dict.fromkeys(
            ("arch", "model", "hook", "store", "path", "model_revision"), EVIL
        )
        facts |= {"name": f"{each.name} {EVIL}", "recipe": {EVIL: EVIL, "seed": 0}}
        if each.baseline:
            facts["of"] = f"{each.run['of']} {EVIL}"
        entries = []
        for e in each.metrics:
            details = dict(e.details)
            if "concepts" in details:
                details["concepts"] = [
                    c | {"concept": f"{c['concept']}{EVIL}", "main": [EVIL],
                         "absorbed": [{"word": EVIL, "latent": EVIL, "share": EVIL}]}
                    for c in details["concepts"]
                ]  # fmt: skip
                details["refused_concepts"] = {EVIL: EVIL}
            if "tasks" in details:
                details["tasks"] = [t | {"task": f"{t['task']}{EVIL}"} for t in details["tasks"]]
                details["malformed"] = [EVIL]
            entries.append(
                replace(
                    e, definition=EVIL, interval=EVIL, details=details, sample={EVIL: 3},
                    source=replace(e.source, name=EVIL, kind=EVIL, suite=EVIL), options={EVIL: EVIL},
                )
            )  # fmt: skip
        entries.append(
            replace(entries[0], metric=EVIL, values={EVIL: next(iter(entries[0].values.values()))})
        )
        changed.append(
            replace(
                with_facts(each, **facts),
                metrics=tuple(entries),
                provenance={"command": EVIL, "versions": {EVIL: EVIL}},
            )
        )
    return changed


def test_hostile_texts_are_shown_and_never_run(tmp_path: Path) -> None:
    made_up = with_details(experiment(tmp_path, seeds=(0,), ks=(4,)))
    write_report(hostile(made_up), tmp_path / "report")
    source = (tmp_path / "report/index.html").read_text()
    assert "\x1b" not in source
    page = Parsed(source)
    assert not page.of("script")
    assert not page.of("img")
    assert not [k for _, attrs in page.tags for k in attrs if k.startswith("on")]
    assert "<script>alert(1)</script>" in page.text
    assert "{{7*7}}" in page.text
    allowed = {"class", "id", "style", "tabindex", "role", "scope", "rowspan", "href", "lang", "name",
               "content", "http-equiv", "charset", "rel", "aria-label", "aria-labelledby", "aria-hidden"}  # fmt: skip
    of_html = {
        k
        for tag, attrs in page.tags
        for k in attrs
        if tag in ("div", "th", "td", "a", "li", "p", "meta", "summary")
    }
    assert of_html <= allowed


@pytest.mark.parametrize(
    "details",
    [
        {},
        {"concepts": 3, "tasks": "x", "latents": {}},
        {"concepts": [1, {"concept": 2}, {"full_absorption": "x"}], "tasks": [[], {"task": 1}]},
        {"log10_density_edges": [1], "latents": [1, 2]},
        {"log10_density_edges": [1, 2, "x"], "latents": [1, 2]},
        {"log10_density_edges": [1], "latents": []},
    ],
)
def test_details_of_another_form_are_left_out(details: dict[str, Any], tmp_path: Path) -> None:
    made_up = with_details(experiment(tmp_path, seeds=(0,), ks=(4,)))
    changed = [
        replace(r, metrics=tuple(replace(e, details=details) for e in r.metrics)) for r in made_up
    ]
    runs = [each for each in judgements_of(changed) if each.baseline is None]
    groups = Groups.of(runs)
    assert letters_section(runs, groups, LatentPages()) is None
    assert ood_section(runs, groups) is None
    assert density_section(runs, groups) is None
    assert absorption_roles(runs[0]) == {}


# --- runs and stores ---


def test_runs_and_stores_are_found_where_the_user_says(
    runs: list[Path], results: Path, store: Path, tmp_path: Path
) -> None:
    gone = [with_facts(r, path="/gone", store="/gone.zarr") for r in with_little(results)]
    said: list[str] = []
    write_report(gone, tmp_path / "a", options=Options(latents=1, examples=1), say=said.append)
    assert all("no page of latents" in line for line in said)
    write_report(
        gone, tmp_path / "b", runs=[runs[0].parent], store=store,
        options=Options(latents=1, examples=1), say=said.append,
    )  # fmt: skip
    assert sum(line.endswith("1 latents of 64") for line in said) == 2
    assert len(list((tmp_path / "b/latents").glob("*.html"))) == 2
    with pytest.raises(InputError, match=re.escape(
        f"There is no finished run at {tmp_path}. Pass run folders of `sae-pipe fit`, or a folder of "
        "them, as --runs."
    )):  # fmt: skip
        write_report(gone, tmp_path / "c", runs=[tmp_path])


def test_weights_that_were_not_judged_are_not_shown(results: Path, tmp_path: Path) -> None:
    changed = [with_facts(r, sae_sha256="0" * 64) for r in with_little(results)]
    write_report(changed, tmp_path / "report", options=Options(latents=1, examples=1))
    text = (tmp_path / "report/index.html").read_text()
    assert "are not those that were judged." in text
    assert not (tmp_path / "report/latents").exists()


def test_latents_may_be_left_out(results: Path, tmp_path: Path) -> None:
    write_report(with_little(results), tmp_path / "report", options=Options(latents=0))
    assert "Latents were not asked for." in (tmp_path / "report/index.html").read_text()
    for bad, sentence in (
        ({"latents": -1}, "--latents must be at least 0, not -1."),
        ({"examples": 0}, "--examples must be at least 1, not 0."),
        ({"rows": 0}, "--rows must be at least 1, not 0."),
    ):
        with pytest.raises(InputError, match=re.escape(sentence)):
            Options(**bad)


def test_absorption_names_main_and_absorbing_latents(tmp_path: Path) -> None:
    (run, *_) = judgements_of(with_details(experiment(tmp_path, seeds=(0,), ks=(4,))))
    roles = absorption_roles(run)
    assert roles[65] == ["main latent of A"]
    assert any(role.startswith("absorbs ") for of_latent in roles.values() for role in of_latent)
    assert len(roles) <= 24


# --- with the results of a real judgement ---


def test_what_eval_writes_is_compared_and_reported(
    runs: list[Path], store: Path, tmp_path: Path
) -> None:
    out = tmp_path / "results"
    evaluate_runs(runs, EvalConfig(out=out, store=store, metrics=("rows",)))
    judged = read_results([out])
    comparison = compare(judged, ["l0"])
    by_name = {line.series.name: line for line in comparison.lines}
    for metric in names_of("rows"):
        for value in HEADLINES.get(metric, ()):
            assert Series(metric=metric, value=value, data=b"").name in by_name
    line = by_name["explained_variance"]
    assert set(line.baselines) == {"untrained", "random latents", "mean"}
    assert line.differences[8].how == "paired"
    assert line.differences[8].value == pytest.approx(
        line.cells[8].estimate.value - line.cells[4].estimate.value
    )
    write_report(judged, tmp_path / "report", options=Options(latents=2, examples=1))
    page = Parsed((tmp_path / "report/index.html").read_text())
    assert {"pareto", "density", "runs"} <= set(page.values("id"))
    assert "masking" not in page.values("id")


# --- the command ---


def test_the_command_writes_a_report_and_says_where(results: Path, tmp_path: Path) -> None:
    out = tmp_path / "report"
    done = CliRunner().invoke(
        app, ["report", str(results), "--out", str(out), "--latents", "1", "--examples", "1", "--rows", "60"]
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert done.stdout.endswith(f"Open {out / 'index.html'}.\n")
    assert (out / "index.html").is_file()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/file").write_text("")
    refused = CliRunner().invoke(app, ["report", str(results), "--out", str(tmp_path / "mine")])
    assert refused.exit_code == 2
    assert "is not a report of sae-pipe" in refused.stderr


def test_results_of_one_run_alone_are_a_report(tmp_path: Path) -> None:
    (first, *_) = experiment(tmp_path, seeds=(0,), ks=(4,))
    write_result(first)
    write_report(read_results([first.path]), tmp_path / "report")
    page = Parsed((tmp_path / "report/index.html").read_text())
    assert "glance" not in page.values("id")
    assert "pareto" in page.values("id")
