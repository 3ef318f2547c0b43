"""The model card of a published SAE: README.md, from its config.json and summary.json.

Both may have come from a stranger: texts of theirs are escaped, so that they stay texts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..storage.card import of_model, of_texts, text_source
from ..storage.licences import is_identifier
from ..storage.shown import shown_in_markdown
from .sae.base import Sae
from .sae.weights import describe_sae
from .sae_formats import get_format
from .sae_formats.facts import Facts, section

MARKER = (
    "<!-- Written by sae-pipe, and again at the next push. Remove this line to keep your own. -->"
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_LONGEST = 300
_METRICS = (
    ("explained_variance", "explained variance", ".4f"),
    ("fvu", "fraction of variance unexplained", ".4f"),
    ("mse", "mean squared error", ".4g"),
    ("l0", "active latents a row (L0)", ".2f"),
    ("dead_fraction", "latents that never fire", ".2%"),
    ("gamma", "gamma: shrinkage, 1 is none", ".3f"),
)
_RECIPE = (
    "tokens", "batch_size", "lr", "steps", "warmup_steps", "decay_start_step", "auxk_coefficient",
    "sparsity", "norm_factor", "seed", "order_seed", "dtype", "epochs",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a card is made from.

    folders: format -> the folder in the repository that its loader takes; refused: format -> why
    it is not among them; summary: summary.json, None where the SAE was not fitted here.
    """

    repo: str
    sae: Sae
    facts: Facts
    summary: Mapping[str, Any] | None
    folders: Mapping[str, str]
    refused: Mapping[str, str]
    has_curve: bool
    licence: str | None = None

    def text(self) -> str:
        """The whole README.md."""
        parts = [self._header(), MARKER, self._title(), *self._loading(), *self._origin()]
        return "\n\n".join([*parts, *self._fit(), *self._judgement(), *self._licence()]) + "\n"

    def _header(self) -> str:
        lines = ["---", "library_name: sae-pipe"]
        # In quotation marks: `no` and `1.0` would be something else.
        chosen = f"license: {json.dumps(self.licence)}"
        lines.append(chosen if self.licence else "# license: choose one")
        model = self.facts.model
        if model is not None and _HUB_ID.fullmatch(model):
            lines.append(f"base_model: {json.dumps(model)}")
        tags = ["sparse-autoencoder", "sae-pipe"] + ["saelens"] * ("saelens" in self.folders)
        return "\n".join([*lines, "tags:", *(f"- {tag}" for tag in tags), "---"])

    def _title(self) -> str:
        sae, facts = self.sae, self.facts
        architecture = escaped(describe_sae(sae)["architecture"])
        where = f"layer {facts.layer}, {escaped(facts.hook)}" if facts.layer is not None else "?"
        k = f", {sae.k} of them active in a row" if sae.k is not None else ""
        return (
            f"# {architecture} sparse autoencoder of {escaped(facts.model or 'an unnamed model')}\n\n"
            f"It turns activations of {sae.d_in} values ({where}) into {sae.d_sae} latents{k}, and "
            "latents back into activations. It takes activations as the model has them: no "
            "normalisation before it, none after it."
        )

    def _loading(self) -> list[str]:
        own = (
            "from sae_pipe.stages.sae import load_sae\n\n"
            f"sae = load_sae({'hf://' + self.repo!r})\n"
            f"latents = sae.encode(x)  # x: (rows, {self.sae.d_in})\n"
            "x_hat = sae.decode(latents)"
        )
        found = ["## Load it", f"With sae-pipe:\n\n{_code(own)}"]
        for format, folder in self.folders.items():
            form = get_format(format)
            code = form.loading(sae=self.sae, facts=self.facts, repo=self.repo, folder=folder)
            found.append(f"With {form.tool}:\n\n{_code(code)}")
        found += [escaped(f"Not for {name}: {why}") for name, why in self.refused.items()]
        return found

    def _origin(self) -> list[str]:
        run, facts = self.facts.run, self.facts
        store = section(run, "store")
        recipe = section(store, "recipe")
        mask = section(recipe, "mask")
        rows = [
            ("model", facts.model),
            ("model revision", facts.model_revision),
            ("layer, hook point", f"{facts.layer}, {facts.hook}"),
            ("input masking", _masking(mask)),
            ("activation store", store.get("path") or store.get("name")),
            ("store digest", store.get("digest")),
            ("rows", store.get("n_rows")),
            ("text", text_source(recipe)),
            ("context size", facts.context_size),
            ("imported", _imported(facts.imported)),
        ]
        return ["## The activations", _table(("", ""), rows)]

    def _fit(self) -> list[str]:
        known = section(self.facts.run, "recipe") | section(self.facts.run, "resolved")
        rows = [(name, known[name]) for name in _RECIPE if known.get(name) is not None]
        if not rows:
            return []
        note = "All of it is in config.json, with the versions and the hardware."
        return ["## The fit", _table(("", ""), rows), note]

    def _judgement(self) -> list[str]:
        found = ["## Judgement"]
        summary = self.summary
        if summary is None:
            return [*found, "It was not judged where it was pushed from."]
        rows = [(label, _formatted(summary.get(name), form)) for name, label, form in _METRICS]
        n_rows = _formatted(summary.get("heldout_rows"), ",.0f")
        found.append(f"On {n_rows} held-out, unmasked rows of documents that no training row has:")
        found.append(_table(("metric", "value"), rows))
        if self.has_curve:
            found.append("![Training curves](curve.png)")
        return found

    def _licence(self) -> list[str]:
        recipe = section(section(self.facts.run, "store"), "recipe")
        chosen = escaped(self.licence) if self.licence else "not chosen yet: name one here"
        lines = [
            f"these weights: {chosen}",
            f"the model: {of_model(self.facts.model)}",
            *(f"the text: {of_text}" for of_text in of_texts(recipe)),
        ]
        return ["## Licence", "\n".join(f"- {line}" for line in lines)]


def check_licence(licence: str | None) -> bool:
    """Whether it is spelt like an identifier of the Hub, such as apache-2.0."""
    return licence is None or is_identifier(licence)


def escaped(value: object) -> str:
    """A text from a file as plain text of Markdown: no markup, no HTML, no links, one line."""
    text = str(value)
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
    return shown_in_markdown(text)


def _code(lines: str) -> str:
    return f"```python\n{lines}\n```"


def _table(header: tuple[str, str], rows: Sequence[tuple[str, object]]) -> str:
    shown = [(name, value) for name, value in rows if value is not None]
    lines = [f"| {header[0]} | {header[1]} |", "| --- | --- |"]
    return "\n".join(
        [*lines, *(f"| {escaped(name)} | {escaped(value)} |" for name, value in shown)]
    )


def _formatted(value: object, form: str) -> str:
    return format(value, form) if type(value) in (int, float) else "not defined"


def _masking(mask: Mapping[str, Any]) -> str | None:
    p = mask.get("p")
    if type(p) not in (int, float):
        return None
    return "none" if p == 0 else f"each token replaced by {mask.get('string')!r} with p = {p:g}"


def _imported(imported: Mapping[str, Any]) -> str | None:
    if not imported:
        return None
    origin = imported.get("from")
    return f"read as {imported.get('format')}" + (f" from {origin}" if origin else "")
