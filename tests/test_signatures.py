"""Signatures of stores: minisign's format, both ways, and each thing that can be wrong.

The vectors under `MINISIGN` were made by minisign 0.11 (Debian 12) with `minisign -G -W` and
`minisign -Sm f -t 'trusted words'` of the file `test`; those under `PUBLISHED` are the ones that the
implementations of the format test themselves with (jedisct1/rust-minisign, ISC licence).
"""

import json
import os
import shutil
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sae_pipe.pipeline.cli import app
from sae_pipe.storage import ActivationStore, InputError, StoreError, minisign, open_store
from sae_pipe.storage.address import Address
from sae_pipe.storage.pull import pull
from sae_pipe.storage.push import push
from sae_pipe.storage.signed import SIGNATURE, check_local

from .services import S3
from .signing import PUBLIC

pytest.importorskip("cryptography")

SIGNED = (
    "untrusted comment: signature from minisign secret key\n"
    "RUQmkPeNSQrg+5Jzm1GQox3XZ6foTp5aPOOByYVhs6qMnd8emqg6hvZu1XIrkhpjBt2FFJgfAQZDnj6AEzg9DqSVXrvBKsCi"
    "qgk=\n"
    "trusted comment: trusted words\n"
    "NjuVTIavyN6mN0Za8PKOdhA/IaI5VQm1i7Gp9fGgzotg+nANOHdsM9dhfhiLq7xH95sjaAoP3AgckZuSTWGkDw==\n"
)
PUBLISHED_KEY = "RWQf6LRCGA9i53mlYecO4IzT51TGPpvWucNSCh1CBM0QTaLn73Y7GFO3"
PUBLISHED = {
    "hashed": (
        "untrusted comment: signature from minisign secret key\n"
        "RUQf6LRCGA9i559r3g7V1qNyJDApGip8MfqcadIgT9CuhV3EMhHoN1mGTkUidF/z7SrlQgXdy8ofjb7bNJJylDOocrCo"
        "8KLzZwo=\n"
        "trusted comment: timestamp:1556193335\tfile:test\n"
        "y/rUw2y8/hOUYjZU71eHp/Wo1KZ40fGy2VJEDl34XMJM+TX48Ss/17u3IvIfbVR1FkZZSNCisQbuQY+bHwhEBg==\n"
    ),
    "legacy": (
        "untrusted comment: signature from minisign secret key\n"
        "RWQf6LRCGA9i59SLOFxz6NxvASXDJeRtuZykwQepbDEGt87ig1BNpWaVWuNrm73YiIiJbq71Wi+dP9eKL8OC351vwIas"
        "SSbXxwA=\n"
        "trusted comment: timestamp:1555779966\tfile:test\n"
        "QtKMXWyYcwdpZAlPF7tE2ENJkRd1ujvKjlj1m9RtHTBnZPa5WKU5uWRs5GoP5M/VqE81QFuMKI5k/SfNQUaOAA==\n"
    ),
}


def told(*arguments: object) -> str:
    """What a command that is refused says."""
    result = CliRunner().invoke(app, [str(each) for each in arguments])
    assert result.exit_code == 2, result.output
    return result.stderr.removeprefix("Error: ").removesuffix("\n")


def shows(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(each) for each in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


# --- the format ---


@pytest.mark.parametrize("kind", PUBLISHED)
def test_published_signatures_hold_and_of_other_bytes_do_not(kind: str) -> None:
    key, signature = minisign.read_public(PUBLISHED_KEY), PUBLISHED[kind].encode()
    assert key.name == "E7620F1842B4E81F"
    assert minisign.check(key, b"test", signature).endswith("file:test")
    with pytest.raises(ValueError, match=r"^it is of other bytes: the file was changed since"):
        minisign.check(key, b"Test", signature)


def test_what_minisign_signed_holds_with_its_key_and_comment(key_file: Path) -> None:
    key = minisign.read_public(PUBLIC)
    assert minisign.read_secret(key_file).public() == key
    assert minisign.check(key, b"test", SIGNED.encode()) == "trusted words"
    other_comment = SIGNED.replace("trusted words", "trusted lies!")
    with pytest.raises(ValueError, match=r"^it is of other bytes"):
        minisign.check(key, b"test", other_comment.encode())


def test_every_changed_bit_of_a_signature_is_noticed(key_file: Path) -> None:
    key = minisign.read_secret(key_file)
    lines = minisign.sign(key, b"test", "a store").split(b"\n")
    for number in (1, 2, 3):  # the first line is free to change
        for at in range(0, len(lines[number]), 7):
            line = bytearray(lines[number])
            line[at] ^= 2
            changed = b"\n".join([*lines[:number], bytes(line), *lines[number + 1 :]])
            with pytest.raises(ValueError, match=r"^it "):
                minisign.check(key.public(), b"test", changed)


@pytest.mark.parametrize(
    "content", ["", "a\nb\nc\nd\n", SIGNED + "more\n", SIGNED.replace("RU", "RV")]
)
def test_what_is_no_signature_is_said_to_be_none(content: str) -> None:
    with pytest.raises(ValueError, match=r"^it is no signature of minisign$"):
        minisign.check(minisign.read_public(PUBLIC), b"test", content.encode())


@pytest.mark.parametrize("password", [None, "a wörd"])
def test_a_generated_key_is_for_its_owner_alone_and_comes_back(
    tmp_path: Path, password: str | None
) -> None:
    file = tmp_path / "keys" / "mine"
    public = minisign.generate(file, password)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert minisign.is_locked(file) == (password is not None)
    assert minisign.read_secret(file, password).public() == public
    assert minisign.read_public(f"{file}.pub") == public
    with pytest.raises(InputError, match=rf"^{file} exists\. Pass another place: a key is never "):
        minisign.generate(file, None)
    if password is not None:
        with pytest.raises(InputError, match=rf"^{file} is damaged, or the password is not its "):
            minisign.read_secret(file, "another")
        with pytest.raises(InputError, match=rf"^{file} is locked with a password\. Set SAE_PIPE_"):
            minisign.read_secret(file)


def test_a_key_that_asks_for_too_much_memory_is_not_read(tmp_path: Path) -> None:
    import base64

    packed = bytearray(158)
    packed[:6] = b"EdScB2"
    packed[38:54] = (1 << 25).to_bytes(8, "little") + (1 << 40).to_bytes(8, "little")
    file = tmp_path / "key"
    file.write_text(f"untrusted comment: x\n{base64.b64encode(packed).decode()}\n")
    with pytest.raises(InputError, match=rf"^{file} asks for more work or memory than minisign "):
        minisign.read_secret(file, "word")


@pytest.mark.skipif(shutil.which("minisign") is None, reason="minisign is not installed")
def test_minisign_itself_takes_our_keys_and_signatures_and_makes_ones_for_us(
    signed: Path, key_file: Path, tmp_path: Path
) -> None:
    manifest = str(signed / "manifest.json")

    def minisign_does(*arguments: object) -> None:
        done = subprocess.run(["minisign", *map(str, arguments)], capture_output=True, check=False)
        assert done.returncode == 0, done.stderr

    minisign_does("-V", "-m", manifest, "-P", PUBLIC)
    mine = minisign.generate(tmp_path / "mine", None)
    (signed / SIGNATURE).unlink()
    minisign_does("-S", "-W", "-s", tmp_path / "mine", "-m", manifest, "-t", "from there")
    minisign_does("-V", "-m", manifest, "-p", tmp_path / "mine.pub")
    assert check_local(signed, mine) == "from there"


# --- stores ---


def test_a_signed_store_is_verified_with_its_key_and_says_what_was_signed(signed: Path) -> None:
    digest = open_store(signed).digest
    said = shows("store", "verify", signed, "--key", PUBLIC).splitlines()
    assert said[0].startswith(f"{signed} is whole: ")
    assert said[1].startswith(f"It was signed with {PUBLIC}: signed ")
    assert said[1].endswith(f", store acts.zarr, digest {digest}.")


def test_sign_and_keygen_work_from_the_command_line(
    small_store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, key = shutil.copytree(small_store.path, tmp_path / "b.zarr"), tmp_path / "k"
    assert told("store", "keygen", key) == (
        "The key needs a password, and there is no terminal to ask in. Set SAE_PIPE_SIGN_PASSWORD."
    )
    monkeypatch.setenv("SAE_PIPE_SIGN_PASSWORD", "word")
    assert shows("store", "keygen", key).startswith(
        f"{key} is the secret key: keep it to yourself."
    )
    assert shows("store", "sign", copy, "--key", key) == (
        f"{copy}/manifest.json.minisig is written: store {copy} is signed.\n"
    )
    assert "is whole" in shows("store", "verify", copy, "--key", f"{key}.pub")


def test_a_password_that_locks_nothing_is_refused_and_any_bytes_are_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAE_PIPE_SIGN_PASSWORD", "")
    assert told("store", "keygen", tmp_path / "k") == (
        "An empty password locks nothing. Give one, or pass --no-password. Nothing was written."
    )
    assert not list(tmp_path.iterdir())
    monkeypatch.setitem(os.environb, b"SAE_PIPE_SIGN_PASSWORD", b"w\xff")
    shows("store", "keygen", tmp_path / "k")
    assert minisign.read_secret(tmp_path / "k", "w\udcff").public()


def _change_norm(path: Path) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["provenance"]["command"] = "harvest of mine"
    (path / "manifest.json").write_text(json.dumps(manifest))


WRONG: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "not signed": (
        lambda path: (path / SIGNATURE).unlink(),
        PUBLIC,
        "Store {path} is not signed: it has no manifest.json.minisig. Ask who made it for one, or "
        "leave --key out to use it unsigned.",
    ),
    "another key": (
        lambda path: None,
        PUBLISHED_KEY,
        "The signature of store {path} does not hold: it was made with key FBE00A498DF79026, and "
        "E7620F1842B4E81F was asked for. Do not use this store unless you know why.",
    ),
    "a manifest changed since": (
        _change_norm,
        PUBLIC,
        "The signature of store {path} does not hold: it is of other bytes: the file was changed "
        "since, or it was made for another one. Do not use this store unless you know why.",
    ),
    "the signature of another store": (
        lambda path: (path / SIGNATURE).write_text(SIGNED),
        PUBLIC,
        "The signature of store {path} does not hold: it is of other bytes: the file was changed "
        "since, or it was made for another one. Do not use this store unless you know why.",
    ),
    "no signature at all": (
        lambda path: (path / SIGNATURE).write_text("trust me"),
        PUBLIC,
        "The signature of store {path} does not hold: it is no signature of minisign. Do not use "
        "this store unless you know why.",
    ),
    "a signature without end": (
        lambda path: (path / SIGNATURE).write_bytes(bytes(9000)),
        PUBLIC,
        "{path}/manifest.json.minisig cannot be read (it has 9,000 bytes, and none needs more than "
        "8,192).",
    ),
    "no key": (
        lambda path: None,
        "minisign.pub",
        "There is no public key at minisign.pub. Pass the file of one.",
    ),
    "no public key": (
        lambda path: None,
        "RWQmkPeNSQrg+/ubl32tbnFMN294rNczpy4y809aUy4Cm3lXZbIvD5a!",
        "RWQmkPeNSQrg+/ubl32tbnFMN294rNczpy4y809aUy4Cm3lXZbIvD5a! is no public key of minisign. Pass "
        "the .pub file that `sae-pipe store keygen` or `minisign -G` wrote.",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_with_a_signature_is_one_sentence_and_nothing_is_pulled(
    signed: Path, tmp_path: Path, name: str
) -> None:
    change, key, message = WRONG[name]
    change(signed)
    assert told("store", "verify", signed, "--key", key) == message.format(path=signed)
    target = tmp_path / "pulled.zarr"
    assert told("store", "pull", signed, target, "--key", key) == message.format(path=signed)
    assert not target.exists()


def test_a_file_that_the_signed_manifest_does_not_record_is_named(signed: Path) -> None:
    (signed / "tokenizer.json").write_text("{}")
    (signed / "corpus/train/.zarray").write_text("{}")
    assert told("store", "verify", signed, "--key", PUBLIC) == (
        f"Store {signed} is signed, and holds files that its manifest does not record: "
        "corpus/train/.zarray, tokenizer.json. Move them away."
    )


def test_every_file_of_a_signed_store_is_covered_but_its_card(signed: Path) -> None:
    for file in sorted(signed.rglob("*")):
        name = file.relative_to(signed).as_posix()
        if file.is_dir() or name in (".lock", SIGNATURE, "README.md"):
            continue
        whole = file.read_bytes()
        if name.split("/")[0] == "activations" and name != "activations/c/0/0":
            continue  # one of its kind is enough
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        assert CliRunner().invoke(app, ["store", "verify", str(signed), "--key", PUBLIC]).exit_code
        file.write_bytes(whole)
    assert check_local(signed, minisign.read_public(PUBLIC))


def test_a_signature_goes_with_its_store_to_an_address_and_back(
    s3: S3, signed: Path, key_file: Path, small_store: ActivationStore, tmp_path: Path
) -> None:
    address, key = Address("s3://lab/signed.zarr"), minisign.read_public(PUBLIC)
    push(small_store.path, address, say=lambda line: None)
    with pytest.raises(StoreError, match=r"^Store s3://lab/signed\.zarr is not signed: it has no "):
        pull(address, tmp_path / "back.zarr", key=key)
    said = shows("store", "push", signed, address, "--sign", key_file)
    assert said.startswith("s3://lab/signed.zarr is complete: ")
    assert "is whole" in shows("store", "verify", address, "--key", PUBLIC)
    pull(address, tmp_path / "back.zarr", key=key, say=lambda line: None)
    assert check_local(tmp_path / "back.zarr", key).endswith(open_store(signed).digest)
    part = tmp_path / "part.zarr"
    shows("store", "pull", address, part, "--rows", "1000", "--key", PUBLIC)
    assert not (part / SIGNATURE).exists()  # its manifest is another one


def test_without_the_library_a_sentence_says_what_to_install(
    signed: Path, key_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        __import__("sys").modules, "cryptography.hazmat.primitives.asymmetric.ed25519", None
    )
    message = (
        "Signatures need cryptography, which is not installed. Run: pip install 'sae-pipe[sign]'."
    )
    assert told("store", "verify", signed, "--key", PUBLIC) == message
    assert told("store", "sign", signed, "--key", key_file) == message
