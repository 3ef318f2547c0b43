"""Copies of signed stores: nothing that stands at a target is believed, and no signature goes astray."""

import json
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest

from sae_pipe.storage import DiskError, InputError, minisign, open_store
from sae_pipe.storage.address import Address
from sae_pipe.storage.manifest import content_digest
from sae_pipe.storage.pull import Part, pull
from sae_pipe.storage.push import push
from sae_pipe.storage.signed import SIGNATURE, SIGNATURE_IS_GONE, check_local, sign_store

from .hostile import change
from .services import S3
from .signing import PUBLIC
from .test_remote_copies import files_of
from .test_signatures import shows, told

pytest.importorskip("cryptography")

KEY = minisign.read_public(PUBLIC)
SHARD = "activations/c/1/0"


def copied(store: Path, name: str) -> Path:
    copy = Path(shutil.copytree(store, store.parent / name))
    (copy / SIGNATURE).unlink(missing_ok=True)
    return copy


def flip(file: Path) -> None:
    """Another last byte, of the same size."""
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def forge(store: Path, name: str) -> None:
    """Another byte in a file that is no shard, recorded as it is."""
    file = store / name
    file.write_bytes(file.read_bytes().replace(b'"', b"'", 1))
    recorded = {"bytes": file.stat().st_size, "sha256": sha256(file.read_bytes()).hexdigest()}
    change(store, lambda m: m["files"].update({name: recorded}))


def quiet_pull(source: Path, target: Path, part: Part | None = None, **options: object) -> str:
    said: list[str] = []
    pull(source, target, part, say=said.append, **options)  # type: ignore[arg-type]
    return said[-1]


TAMPERED: dict[str, Callable[[Path], object]] = {
    "a file that is recorded as it was changed": lambda store: forge(store, "zarr.json"),
    "a byte of a shard": lambda store: flip(store / SHARD),
    "a byte of the tokens": lambda store: flip(store / "corpus/train/zarr.json"),
    "a list of tokens that is none": lambda store: (store / "corpus/corpus.json").write_text("{}"),
    "a manifest that says more": lambda store: change(store, lambda m: m.update(licence="mit")),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_what_was_tampered_with_at_the_target_is_fetched_again_with_a_key(
    signed: Path, name: str
) -> None:
    target = copied(signed, "copy.zarr")
    TAMPERED[name](target)
    assert quiet_pull(signed, target, key=KEY).startswith(f"{target} is complete: 4,")
    assert files_of(target) == files_of(signed)
    said = quiet_pull(signed, target, key=KEY)
    assert said == f"{target} is complete: it is what {signed} holds. Nothing to do."


def test_a_copy_with_files_that_the_signed_manifest_does_not_record_is_refused(
    signed: Path,
) -> None:
    target = copied(signed, "copy.zarr")
    (target / "tokenizer.json").write_text("{}")
    message = (
        f"Store {target} is signed, and holds files that its manifest does not record: "
        "tokenizer.json. Move them away."
    )
    assert told("store", "pull", signed, target, "--key", PUBLIC) == message
    change(target, lambda m: m.update(licence="mit"))
    said = told("store", "pull", signed, target, "--key", PUBLIC)
    assert said.rpartition("Error: ")[2] == message


def test_without_a_key_a_copy_with_another_manifest_is_not_said_to_be_the_store(
    signed: Path,
) -> None:
    target = copied(signed, "copy.zarr")
    forge(target, "zarr.json")
    before = files_of(target)
    message = (
        rf"^{target} holds the rows that were asked for of {signed}, but its manifest\.json is "
        r"another one: licences, statistics, other files or notes of how it was made differ\. Pass "
        r"another place, or move it away\.$"
    )
    with pytest.raises(InputError, match=message):
        quiet_pull(signed, target)
    assert files_of(target) == before
    shows("store", "push", signed, target)  # whoever sends a store says what it is
    assert files_of(target) == files_of(signed)


def test_a_part_is_made_anew_of_the_signed_manifest(signed: Path, tmp_path: Path) -> None:
    part, fresh = Part(rows=1100), tmp_path / "fresh.zarr"
    quiet_pull(signed, fresh, part, key=KEY)
    tampered: list[Callable[[Path], object]] = [
        lambda store: forge(store, "zarr.json"),
        lambda store: flip(store / SHARD),
        lambda store: (store / SIGNATURE).write_text("of another manifest"),
        lambda store: change(store, lambda m: m["provenance"].pop("sampled")),
    ]
    for number, tamper in enumerate(tampered):
        target = Path(shutil.copytree(fresh, tmp_path / f"part-{number}.zarr"))
        tamper(target)
        quiet_pull(signed, target, part, key=KEY)
        assert files_of(target) == files_of(fresh)
    (fresh / "evil.json").write_text("{}")
    with pytest.raises(Exception, match=r"does not record: evil\.json\. Move them away\.$"):
        quiet_pull(signed, fresh, part, key=KEY)


@pytest.mark.parametrize("with_key", [True, False])
def test_a_part_that_only_says_what_it_is_a_part_of_is_another_store(
    signed: Path, tmp_path: Path, with_key: bool
) -> None:
    part, target = Part(rows=1100), tmp_path / "part.zarr"
    quiet_pull(signed, target, part)
    flip(target / SHARD)
    entry = {"sha256": sha256((target / SHARD).read_bytes()).hexdigest()}
    change(target, lambda m: m["train"]["shards"][1]["files"]["activations"].update(entry))
    assert (
        open_store(target).manifest["provenance"]["sampled"]["digest"] == open_store(signed).digest
    )
    with pytest.raises(InputError, match=rf"^{target} holds another store, with the digest "):
        quiet_pull(signed, target, part, key=KEY if with_key else None)


def test_a_signature_made_later_comes_to_copies_that_are_complete(
    signed: Path, key_file: Path, tmp_path: Path
) -> None:
    source = copied(signed, "source.zarr")
    pulled, pushed = tmp_path / "pulled.zarr", tmp_path / "pushed.zarr"
    quiet_pull(source, pulled)
    quiet_pull(source, pushed)
    assert not (pulled / SIGNATURE).exists()
    sign_store(source, minisign.read_secret(key_file))
    assert quiet_pull(source, pulled) == (
        f"{pulled} is complete: it is what {source} holds. Its {SIGNATURE} was fetched."
    )
    shows("store", "push", source, pushed)
    (source / SIGNATURE).unlink()
    quiet_pull(source, pulled)  # one that is there alone stays
    for copy in (pulled, pushed):
        assert check_local(copy, KEY).endswith(open_store(copy).digest)


def test_a_signature_comes_before_the_manifest_that_it_is_of(signed: Path, tmp_path: Path) -> None:
    target = tmp_path / "back.zarr"
    (target / "manifest.json/in the way").mkdir(parents=True)
    identity = {"digest": open_store(signed).digest, "shards": None}
    (target / ".pulling").write_text(json.dumps(identity))
    with pytest.raises(DiskError, match=rf"^{target}/manifest\.json could not be written"):
        quiet_pull(signed, target)
    assert (target / SIGNATURE).read_bytes() == (signed / SIGNATURE).read_bytes()
    shutil.rmtree(target / "manifest.json")
    quiet_pull(signed, target)
    assert check_local(target, KEY)


def test_a_push_over_another_manifest_sends_what_it_records_otherwise(s3: S3, signed: Path) -> None:
    address, other = Address("s3://lab/renewed.zarr"), copied(signed, "other.zarr")
    sign = minisign.read_secret(signed.parent / "minisign.key")
    forge(other, "zarr.json")
    sign_store(other, sign)
    push(other, address, say=lambda line: None)
    (signed / SIGNATURE).unlink()
    said: list[str] = []
    push(signed, address, say=said.append)
    assert said[0] == (
        f"{address}/manifest.json.minisig is of the manifest that was there before, and does not "
        "hold any more. Push again with --sign."
    )
    assert "is whole" in shows("store", "verify", address)
    sign_store(signed, sign)
    push(signed, address, say=said.append)
    assert "is whole" in shows("store", "verify", address, "--key", PUBLIC)


def test_a_licence_takes_the_signature_of_the_manifest_before_away_and_says_so(
    signed: Path,
) -> None:
    card = ("store", "card", signed, "--license", "mit")
    assert shows(*card) == f"{signed}/README.md is written.\n{SIGNATURE_IS_GONE}\n"
    assert not (signed / SIGNATURE).exists()
    sign_store(signed, minisign.read_secret(signed.parent / "minisign.key"))
    assert shows(*card) == f"{signed}/README.md is written.\n"  # the same again changes nothing
    assert check_local(signed, KEY)


def test_a_repair_that_changes_the_manifest_takes_its_signature_away(signed: Path) -> None:
    file = signed / "statistics/mean/zarr.json"
    whole = file.read_bytes()
    file.write_bytes(b"{}")
    shows("store", "repair", signed)
    assert file.read_bytes() == whole
    assert check_local(signed, KEY)  # made again as it was signed
    manifest = json.loads((signed / "manifest.json").read_text())
    manifest["files"]["zarr.json"]["bytes"] += 1
    assert manifest["digest"] == content_digest(manifest)
    (signed / "manifest.json").write_text(json.dumps(manifest))
    sign_store(signed, minisign.read_secret(signed.parent / "minisign.key"))
    assert SIGNATURE_IS_GONE in shows("store", "repair", signed)
    assert not (signed / SIGNATURE).exists()
