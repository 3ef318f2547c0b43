"""Packing documents into contexts, against the plain definition."""

from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_pipe.stages.packing import ContextRules, FlatFiles, Packer
from sae_pipe.storage.corpus import row_positions

BOS, EOS = 1, 0

RULES = st.builds(
    ContextRules,
    context_size=st.integers(2, 9),
    pack=st.booleans(),
    keep_first=st.booleans(),
    bos_id=st.sampled_from([None, BOS, EOS]),
    eos_id=st.just(EOS),
    prepends_bos=st.just(False),
) | st.builds(
    ContextRules,
    context_size=st.integers(2, 9),
    pack=st.booleans(),
    keep_first=st.booleans(),
    bos_id=st.just(BOS),
    eos_id=st.just(EOS),
    prepends_bos=st.just(True),
)
DOCUMENTS = st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=30), max_size=12)


def _pack(
    rules: ContextRules, documents: list[list[int]], wanted: int | None = None
) -> tuple[Packer, dict[str, np.ndarray[tuple[int, ...], np.dtype[np.uint32]]]]:
    packer = Packer(rules, wanted)
    with TemporaryDirectory() as folder:
        flat = FlatFiles(Path(folder), "train", rules)
        with flat:
            for record, tokens in enumerate(documents):
                text = packer.add(np.array(tokens, dtype=np.uint32))
                if text is not None:
                    flat.write(text, record)
        if packer.contexts == 0:
            return packer, {}
        return packer, flat.gather(np.arange(packer.contexts))


@settings(deadline=None)
@given(RULES, DOCUMENTS)
def test_packing_loses_and_repeats_no_token(
    rules: ContextRules, documents: list[list[int]]
) -> None:
    packer, table = _pack(rules, documents)
    bos = [BOS] * rules.prepends_bos
    if rules.pack:
        text = list(chain.from_iterable([*document, EOS] for document in documents))
        marks = list(chain.from_iterable([i] * (len(d) + 1) for i, d in enumerate(documents)))
        n = len(text) // rules.width
        starts = [i * rules.width for i in range(n)]
        expected = [bos + text[start : start + rules.width] for start in starts]
        records = [marks[start : start + rules.width] for start in starts]
        assert packer.dropped_tokens == len(text) - n * rules.width
    else:
        cut = [(bos + document[: rules.width], i) for i, document in enumerate(documents)]
        yielding = [pair for pair in cut if _rows(rules, pair[0])]
        assert packer.too_short == len(cut) - len(yielding)
        expected = [context for context, _ in yielding]
        records = [[i] * len(context) for context, i in yielding]
    assert packer.contexts == len(expected)
    assert packer.rows == sum(_rows(rules, context) for context in expected)
    for i, context in enumerate(expected):
        length = int(table["length"][i])
        assert table["tokens"][i, :length].tolist() == context
        assert table["document"][i, :length].tolist()[-len(records[i]) :] == records[i]
        assert set(table["tokens"][i, length:].tolist()) <= {EOS}
        assert table["origin"][i] == i


def _rows(rules: ContextRules, context: list[int]) -> int:
    """The rule in words: not the first position and not BOS, unless these are kept."""
    if rules.keep_first:
        return len(context)
    return sum(token != rules.bos_id for token in context[1:])


@settings(deadline=None)
@given(RULES, DOCUMENTS)
def test_counted_rows_are_those_of_the_reader_s_rule(
    rules: ContextRules, documents: list[list[int]]
) -> None:
    packer, table = _pack(rules, documents)
    if table:
        rows = row_positions(
            table["tokens"], table["length"], bos_id=rules.bos_id, keep_first=rules.keep_first
        )
        assert packer.rows == np.count_nonzero(rows)


@settings(deadline=None)
@given(RULES, DOCUMENTS, st.integers(1, 60))
def test_a_full_split_has_no_context_more_than_it_needs(
    rules: ContextRules, documents: list[list[int]], wanted: int
) -> None:
    everything, whole = _pack(rules, documents)
    packer, table = _pack(rules, documents, wanted)
    assert packer.is_full == (everything.rows >= wanted)
    if table:
        assert np.array_equal(table["tokens"], whole["tokens"][: packer.contexts])
        rows = row_positions(
            table["tokens"], table["length"], bos_id=rules.bos_id, keep_first=rules.keep_first
        ).sum(axis=1)
        assert packer.rows == rows.sum()
        if packer.is_full:
            assert rows[:-1].sum() < wanted <= rows.sum()
    taken = packer.documents + packer.surplus + packer.too_short
    assert taken == len(documents)


@pytest.mark.parametrize("pack", [True, False])
def test_padding_never_yields_a_row(pack: bool) -> None:
    rules = ContextRules(
        context_size=8, pack=pack, keep_first=True, bos_id=None, eos_id=EOS, prepends_bos=False
    )
    packer, table = _pack(rules, [[5, 5, 5], [4] * 12])
    rows = row_positions(table["tokens"], table["length"], bos_id=None, keep_first=True)
    assert rows.sum() == packer.rows == (16 if pack else 11)
