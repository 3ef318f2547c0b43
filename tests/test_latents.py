"""What latents fire on: whole contexts and histograms, against plain encoding of all rows."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from sae_pipe.stages.latent_scan import N_BINS, bin_edges, scan_rows
from sae_pipe.stages.latents import Survey, survey_latents, top_activations
from sae_pipe.stages.sae import load_sae
from sae_pipe.stages.sae.base import Sae
from sae_pipe.stages.tokens import decode_tokens
from sae_pipe.storage import ActivationStore, open_store
from sae_pipe.storage.errors import InputError

from .reporting import fit_two


@pytest.fixture(scope="module")
def opened(store: Path) -> ActivationStore:
    return open_store(store)


@pytest.fixture(scope="module")
def sae(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Sae:
    return load_sae(fit_two(store, tmp_path_factory.mktemp("runs"))[0])


@pytest.fixture(scope="module")
def latents_NS(opened: ActivationStore, sae: Sae) -> NDArray[np.float32]:
    """Every held-out row, encoded at once."""
    rows = opened.heldout.read(0, opened.heldout.n_rows)
    return np.asarray(sae.encode(torch.from_numpy(rows)))


@pytest.fixture(scope="module")
def survey(opened: ActivationStore, sae: Sae) -> Survey:
    return survey_latents(sae, opened, count=10, examples=3)


def test_shades_are_the_activations_of_every_row_of_a_context(
    opened: ActivationStore, survey: Survey, latents_NS: NDArray[np.float32]
) -> None:
    table = opened.corpus.heldout
    context_N, position_N = np.divmod(opened.heldout.source(0, len(latents_NS)), table.context_size)
    for latent in survey.latents:
        for shaded in latent.contexts:
            ids = table.context(shaded.context)
            assert shaded.tokens == decode_tokens(opened.path / "tokenizer.json", ids.tolist())
            wanted_T = np.full(len(ids), np.nan)
            here = context_N == shaded.context
            wanted_T[position_N[here]] = latents_NS[here, latent.index]
            np.testing.assert_allclose(shaded.activation_T, wanted_T, rtol=1e-4, atol=1e-5)
            assert np.isnan(shaded.activation_T[0])  # the first position is a sink and has no row
            assert shaded.largest == np.nanmax(shaded.activation_T)


def test_contexts_are_those_with_the_largest_activations_and_none_comes_twice(
    opened: ActivationStore, survey: Survey, latents_NS: NDArray[np.float32]
) -> None:
    context_N = opened.heldout.source(0, len(latents_NS)) // opened.corpus.heldout.context_size
    for latent in survey.latents:
        found = [context.context for context in latent.contexts]
        assert len(set(found)) == len(found)
        largest = {
            context: latents_NS[context_N == context, latent.index].max()
            for context in np.unique(context_N).tolist()
        }
        active = sorted((value for value in largest.values() if value > 0), reverse=True)
        shown = [context.largest for context in latent.contexts]
        assert shown == pytest.approx(active[: len(shown)], rel=1e-4)
        assert len(shown) == min(3, len(active))


def test_histograms_count_every_activation_above_0_in_its_bin(
    opened: ActivationStore, sae: Sae, latents_NS: NDArray[np.float32]
) -> None:
    scan = scan_rows(sae, opened, len(latents_NS), top=2, with_histogram=True)
    assert scan.histogram_SH is not None
    np.testing.assert_array_equal(scan.histogram_SH.sum(axis=1), (latents_NS > 0).sum(axis=0))
    np.testing.assert_array_equal(scan.fired_S, (latents_NS > 0).sum(axis=0))
    for latent in np.flatnonzero(scan.fired_S)[:5]:
        active = latents_NS[latents_NS[:, latent] > 0, latent].astype(np.float64)
        wanted, _ = np.histogram(active, bin_edges())
        assert np.abs(scan.histogram_SH[latent] - wanted).sum() <= 2  # a value at a border
    assert len(bin_edges()) == N_BINS + 1


def test_views_leave_out_empty_bins_and_say_how_often_a_latent_fires(
    survey: Survey, latents_NS: NDArray[np.float32]
) -> None:
    assert survey.n_rows == len(latents_NS)
    assert survey.dead == (latents_NS == 0).all(axis=0).sum()
    for latent in survey.latents:
        assert latent.rows == (latents_NS[:, latent.index] > 0).sum() == sum(latent.counts)
        assert latent.counts[0] > 0 < latent.counts[-1]
        assert len(latent.edges) == len(latent.counts) + 1


def test_named_latents_are_shown_beside_the_spread_dead_ones_too(
    opened: ActivationStore, sae: Sae, latents_NS: NDArray[np.float32]
) -> None:
    rare = int((latents_NS > 0).sum(axis=0).argmin())
    found = survey_latents(sae, opened, count=2, also=[rare], examples=2, max_rows=50)
    assert found.n_rows == 50
    assert found.latents[-1].index == rare
    shown = {latent.index: latent for latent in found.latents}
    if not (latents_NS[:50, rare] > 0).any():
        assert (shown[rare].contexts, shown[rare].counts, shown[rare].edges) == ([], [], [])


def test_top_activations_are_the_largest_of_all_rows(
    opened: ActivationStore, sae: Sae, latents_NS: NDArray[np.float32]
) -> None:
    latent = int((latents_NS > 0).sum(axis=0).argmax())
    (found,) = top_activations(sae, opened, [latent], examples=4)
    wanted = np.sort(latents_NS[:, latent])[::-1][:4]
    assert [e.activation for e in found.examples] == pytest.approx(wanted.tolist(), rel=1e-4)


def test_what_cannot_be_shown_is_refused(opened: ActivationStore, sae: Sae) -> None:
    with pytest.raises(InputError, match=re.escape(
        "Latent 64 does not exist: the SAE has latents 0 to 63."
    )):  # fmt: skip
        survey_latents(sae, opened, also=[64])
    with pytest.raises(InputError, match=r"--examples must be at least 1, not 0\."):
        survey_latents(sae, opened, examples=0)
