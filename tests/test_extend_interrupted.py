"""An extension that is killed, stopped or run again: a whole store at any time, and the same bytes."""

import json
import shutil
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sae_pipe.stages import harvest_plan, harvest_run
from sae_pipe.stages.harvest import harvest
from sae_pipe.stages.harvest_config import HarvestConfig
from sae_pipe.stages.plan import Rates
from sae_pipe.stages.repair import repair
from sae_pipe.storage import DiskError, InputError, StoreError, open_store
from sae_pipe.storage.info import describe
from sae_pipe.storage.lock import sole_writer
from sae_pipe.storage.manifest import content_digest, read_manifest

from .harvesting import config_for, content, quiet
from .interrupting import run_in_child, run_until

AFTER = 9000

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


@pytest.fixture(autouse=True)
def _no_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = Rates(tokens_per_s=1e4, bytes_per_value=1.4)
    monkeypatch.setattr(harvest_run, "measure", lambda *_: rates)


@pytest.fixture
def extending(lm: Path, text: Path, store: Path, tmp_path: Path) -> HarvestConfig:
    """The command that extends a copy of the store of `config_for`."""
    out = Path(shutil.copytree(store, tmp_path / "acts.zarr"))
    return config_for(lm, text, out, tokens=AFTER, extend=True)


@pytest.fixture(scope="module")
def extended(
    lm: Path, text: Path, store: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    """The content of the store once it was extended without interruption."""
    out = tmp_path_factory.mktemp("extended") / "acts.zarr"
    shutil.copytree(store, out)
    quiet(config_for(lm, text, out, tokens=AFTER, extend=True))
    return content(out)


# What an extension comes to, in order: each is a list of writes, the last of which is the moment.
PREPARING = (
    [r"fsync .*/\.extending/corpus\.building/cache\.tokens"],
    [r"replace .*building/corpus/train/tokens/c/0"],
    [r"replace .*building/corpus/corpus\.json"],
    [r"replace .*\.extending/corpus$"],
    [r"replace .*\.extending/masked/zarr\.json"],
    [r"replace .*\.extending/manifest\.json"],
    [r"replace .*\.extending/source/c/11"],
    [r"replace .*\.extending/activations/c/11/0"],
    [r"replace .*\.extending/\.commits/train/00000011"],
    [r"fsync .*\.extending/activations/c/16/\.0"],
    [r"replace .*\.extending/statistics/variance/c/0"],
    [r"replace .*statistics/variance/c/0", r"replace .*\.extending/manifest\.json"],
    [r"replace .*acts\.zarr/manifest\.json"],
)
SWITCHING = (
    [r"replace .*acts\.zarr/activations/c/11/0"],
    [r"replace .*acts\.zarr/source/c/12"],
    [r"replace .*acts\.zarr/statistics/mean/c/0"],
    [r"replace .*acts\.zarr/corpus/corpus\.json"],
    [r"replace .*acts\.zarr/zarr\.json"],
    [r"replace .*acts\.zarr/zarr\.json", r"replace .*acts\.zarr/manifest\.json"],
)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs names of open files")
def test_killed_at_every_kind_of_write_the_store_is_the_old_one_or_says_so_and_then_the_new_one(
    extending: HarvestConfig, store: Path, extended: dict[str, bytes]
) -> None:
    out, old = extending.out, open_store(store)
    for moment in PREPARING:
        assert run_until(extending, moment) == -signal.SIGKILL, f"{moment} never came"
        opened = open_store(out)
        assert opened.digest == old.digest
        np.testing.assert_array_equal(opened.read([0, 5999]), old.read([0, 5999]))
        opened.corpus.verify()
    message = (
        f"^Store {out} is being extended: its new files are being put to their places. Try again in a "
        "moment; if that was interrupted, run the `sae-pipe harvest --extend` command once more.$"
    )
    for moment in SWITCHING:
        assert run_until(extending, moment) == -signal.SIGKILL, f"{moment} never came"
        for use in (open_store, repair, lambda path: quiet(replace(extending, extend=False))):
            with pytest.raises(StoreError, match=message):
                use(out)
    last = SWITCHING[-1][-1:]
    assert run_until(extending, last, is_done=True) == -signal.SIGKILL
    assert open_store(out).n_rows == AFTER
    quiet(extending)
    assert content(out) == extended


def test_killed_at_random_instants_an_extension_gives_the_bytes_of_one_never_interrupted(
    extending: HarvestConfig, store: Path, tmp_path: Path, extended: dict[str, bytes]
) -> None:
    whole = Path(shutil.copytree(store, tmp_path / "whole" / "acts.zarr"))
    code, events = run_in_child(replace(extending, out=whole, note_every_s=0.0))
    assert code == 0
    assert content(whole) == extended
    rng, kills = np.random.default_rng(4), 0
    config = replace(extending, note_every_s=0.0)
    while (code := run_in_child(config, int(rng.integers(1, events // 2)))[0]) != 0:
        assert code == -signal.SIGKILL
        kills += 1
        assert kills < 60
    assert content(config.out) == extended
    assert kills >= 2


def test_an_extension_that_was_begun_is_finished_before_another_is(
    extending: HarvestConfig, extended: dict[str, bytes]
) -> None:
    out = extending.out
    moment = [r"replace .*\.extending/\.commits/train/00000013"]
    assert run_until(extending, moment) == -signal.SIGKILL
    message = (
        f"^The extension of {out} to 9,000 rows was begun and is not finished, and --tokens is 9,500. "
        f"Pass --tokens 9000 to finish it first, or remove {out}/.extending to give it up.$"
    )
    with pytest.raises(InputError, match=message):
        quiet(replace(extending, tokens=9500))
    with sole_writer(out, "Store"), pytest.raises(InputError, match="is being written by another"):
        quiet(extending)
    sealed = len(list((out / ".extending/.commits/train").iterdir()))
    assert 1 <= sealed <= 2
    shards = f"{sealed} of 7 new shards are sealed"
    state = dict(describe(out, read_manifest(out)))["state"]
    assert state == f"complete; its extension to 9,000 rows is not finished: {shards}"
    said: list[str] = []
    harvest(extending, say=said.append, show_progress=False)
    assert said[0] == f"{out} goes on being extended: {shards}"
    assert content(out) == extended


def test_a_store_that_became_another_one_meanwhile_is_not_mixed_with_the_extension(
    extending: HarvestConfig,
) -> None:
    out = extending.out
    moment = [r"replace .*\.extending/\.commits/train/00000013"]
    assert run_until(extending, moment) == -signal.SIGKILL
    manifest = read_manifest(out)
    digest, manifest["recipe"]["note"] = manifest["digest"], "of another store"
    manifest["digest"] = other = content_digest(manifest)
    (out / "manifest.json").write_text(json.dumps(manifest))
    message = (
        f"^Store {out} is another one than when its extension was begun: its digest is {other}, and "
        f"was {digest}. Remove {out}/.extending and extend it again.$"
    )
    with pytest.raises(StoreError, match=message):
        quiet(extending)


def test_nothing_is_written_or_removed_through_a_link(
    extending: HarvestConfig, tmp_path: Path
) -> None:
    (tmp_path / "thesis/corpus").mkdir(parents=True)
    (tmp_path / "thesis/corpus/thesis.tex").write_text("years of work")
    link = extending.out / ".extending"
    link.symlink_to(tmp_path / "thesis")
    message = f"^{link} is a symbolic link, and nothing is written through one. Remove it, or pass another place.$"
    with pytest.raises(StoreError, match=message):
        quiet(extending)
    assert (tmp_path / "thesis/corpus/thesis.tex").read_text() == "years of work"


def test_a_full_disk_leaves_the_old_store_and_the_next_command_goes_on(
    extending: HarvestConfig,
    store: Path,
    extended: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    mounted = shutil.which("mount") and subprocess.run(mount, check=False, capture_output=True)
    if not mounted or mounted.returncode:
        pytest.skip("a small disk can only be mounted by root")
    try:
        out = Path(shutil.copytree(store, disk / "acts.zarr"))
        used = shutil.disk_usage(disk).used
        size = f"remount,size={used // 1024 + 300}k"
        subprocess.run(["mount", "-o", size, str(disk)], check=True)
        monkeypatch.setattr(harvest_plan, "free_bytes", lambda path: 10**12)
        config = replace(extending, out=out)
        with pytest.raises(DiskError, match=r"^The disk is full: .* could not be written\."):
            quiet(config)
        assert open_store(out).digest == open_store(store).digest
        subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
        quiet(config)
        assert content(out) == extended
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
