"""Signatures in the format of minisign, which other tools check and make too (docs/security.md).

Ed25519 over the BLAKE2b-512 of a file, with a trusted comment that is signed together with it:

    public key   comment, base64("Ed" | key id 8 | key 32)
    secret key   comment, base64("Ed" | kdf 2 | "B2" | salt 32 | ops 8 | mem 8 | locked 104)
    signature    untrusted comment, base64("ED" | key id 8 | signature 64),
                 trusted comment, base64(signature of: signature | trusted comment)

`locked` is key id 8, seed 32, public key 32, and the BLAKE2b-256 of "Ed" and those, all of it with
the output of scrypt XORed onto it where kdf is "Sc". Source: minisign's README and manual page
(jedisct1/minisign, ISC licence); the parameters of scrypt are those that libsodium picks for ops
and mem. "Ed" in the place of "ED" is the older kind, of the file itself; it is read, not written.
"""

from __future__ import annotations

import base64
import hashlib
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import InputError
from .files import disk_error, fsync_folder
from .shown import shown

SUFFIX = ".minisig"
PASSWORD = "SAE_PIPE_SIGN_PASSWORD"  # the environment variable
LIMIT_BYTES = 8192  # of any of the three files
_ALGORITHM, _HASHED, _LOCKED, _CHECKSUM = b"Ed", b"ED", b"Sc", b"B2"
_UNTRUSTED, _TRUSTED = "untrusted comment: ", "trusted comment: "
_MEM_BYTES = 1 << 27  # of scrypt for keys made here: N = 2^17
_MOST_MEM_BYTES = 1 << 30  # what minisign itself uses


@dataclass(frozen=True, kw_only=True)
class PublicKey:
    """id: 8 bytes; raw: the Ed25519 key, 32 bytes."""

    id: bytes
    raw: bytes

    @property
    def name(self) -> str:
        """The key id as minisign shows it."""
        return self.id[::-1].hex().upper()


@dataclass(frozen=True, kw_only=True)
class SecretKey:
    """seed: of the Ed25519 key, 32 bytes."""

    id: bytes
    seed: bytes

    def public(self) -> PublicKey:
        return PublicKey(id=self.id, raw=_ed25519().from_private_bytes(self.seed)
                         .public_key().public_bytes_raw())  # fmt: skip


def _ed25519() -> Any:
    """Ed25519PrivateKey of the library; InputError where that is not installed."""
    try:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    except ImportError as error:
        raise InputError(
            "Signatures need cryptography, which is not installed. Run: pip install "
            "'sae-pipe[sign]'."
        ) from error
    return Ed25519PrivateKey


# --- signatures ---


def sign(key: SecretKey, data: bytes, comment: str) -> bytes:
    """The signature file of some data. comment: one line that is signed with it."""
    private = _ed25519().from_private_bytes(key.seed)
    signature = private.sign(hashlib.blake2b(data).digest())
    trusted = shown(comment)
    over_all = private.sign(signature + trusted.encode())
    lines = [
        f"{_UNTRUSTED}signature from sae-pipe, key {key.public().name}",
        _base64(_HASHED + key.id + signature),
        f"{_TRUSTED}{trusted}",
        _base64(over_all),
    ]
    return ("\n".join(lines) + "\n").encode()


def check(key: PublicKey, data: bytes, signature_file: bytes) -> str:
    """The trusted comment of a signature; ValueError, a clause, unless it is this key's of this data."""
    _ed25519()
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        lines = signature_file.decode().split("\n")
        untrusted, signed, trusted, over_all = lines[:4]
        packed, outer = _bytes(signed, 74), _bytes(over_all, 64)
        is_form = untrusted.startswith(_UNTRUSTED) and trusted.startswith(_TRUSTED)
        if not is_form or any(lines[4:]) or packed[:2] not in (_ALGORITHM, _HASHED):
            raise ValueError
    except ValueError:
        raise ValueError("it is no signature of minisign") from None
    kind, key_id, signature = packed[:2], packed[2:10], packed[10:]
    if key_id != key.id:
        by = PublicKey(id=key_id, raw=b"").name
        raise ValueError(f"it was made with key {by}, and {key.name} was asked for")
    comment = trusted.removeprefix(_TRUSTED).removesuffix("\r")
    public = Ed25519PublicKey.from_public_bytes(key.raw)
    try:
        public.verify(signature, hashlib.blake2b(data).digest() if kind == _HASHED else data)
        public.verify(outer, signature + comment.encode())
    except InvalidSignature:
        raise ValueError(
            "it is of other bytes: the file was changed since, or it was made for another one"
        ) from None
    return comment


# --- keys ---


def read_public(text: str) -> PublicKey:
    """A public key from a file, or the base64 line itself. Raises InputError."""
    line = text.strip()
    is_line = len(line) == 56 and not Path(text).exists()
    lines = [_UNTRUSTED, line] if is_line else _lines(Path(text), "public key")
    try:
        packed = _bytes(lines[1], 42)
        if packed[:2] != _ALGORITHM:
            raise ValueError
    except (ValueError, IndexError):
        raise InputError(
            f"{text} is no public key of minisign. Pass the .pub file that `sae-pipe store keygen` "
            "or `minisign -G` wrote."
        ) from None
    return PublicKey(id=packed[2:10], raw=packed[10:])


def read_secret(path: Path, password: str | None = None) -> SecretKey:
    """A secret key from its file. password: of one that is locked. Raises InputError."""
    lines = _lines(path, "secret key")
    try:
        packed = _bytes(lines[1], 158)
        kdf, checksum = packed[2:4], packed[4:6]
        if packed[:2] != _ALGORITHM or kdf not in (_LOCKED, b"\0\0") or checksum != _CHECKSUM:
            raise ValueError
    except (ValueError, IndexError):
        raise InputError(
            f"{path} is no secret key of minisign. Pass the file that `sae-pipe store keygen` or "
            "`minisign -G` wrote."
        ) from None
    salt, locked = packed[6:38], packed[54:]
    if kdf == _LOCKED:
        ops, mem = (int.from_bytes(packed[at : at + 8], "little") for at in (38, 46))
        if password is None:
            raise InputError(
                f"{path} is locked with a password. Set {PASSWORD}, or run the command in a terminal, "
                "which asks for it."
            )
        locked = _xor(locked, _stream(path, password, salt, ops, mem))
    key_id, seed, public, digest = locked[:8], locked[8:40], locked[40:72], locked[72:]
    if hashlib.blake2b(_ALGORITHM + locked[:72], digest_size=32).digest() != digest:
        # Keys that `minisign -W` writes have no checksum.
        is_open = kdf != _LOCKED and not any(digest)
        if not is_open or SecretKey(id=key_id, seed=seed).public().raw != public:
            raise InputError(f"{path} is damaged, or the password is not its own.")
    return SecretKey(id=key_id, seed=seed)


def is_locked(path: Path) -> bool:
    """Whether a secret key needs a password; False for what is none, which `read_secret` refuses."""
    try:
        return _bytes(_lines(path, "secret key")[1], 158)[2:4] == _LOCKED
    except (ValueError, IndexError):
        return False


def generate(path: Path, password: str | None) -> PublicKey:
    """A new key pair: the secret key at `path`, readable by its owner alone, the public one beside it.

    password: None leaves the key open. Raises InputError when one of the files is there already.
    """
    seed, key_id = secrets.token_bytes(32), secrets.token_bytes(8)
    public = SecretKey(id=key_id, seed=seed).public()
    plain = key_id + seed + public.raw
    plain += hashlib.blake2b(_ALGORITHM + plain, digest_size=32).digest()
    if password is None:
        kdf, salt, ops, mem = b"\0\0", bytes(32), 0, 0
    else:
        kdf, salt, mem, ops = _LOCKED, secrets.token_bytes(32), _MEM_BYTES, _MEM_BYTES // 32
        plain = _xor(plain, _stream(path, password, salt, ops, mem))
    sizes = ops.to_bytes(8, "little") + mem.to_bytes(8, "little")
    secret = _base64(_ALGORITHM + kdf + _CHECKSUM + salt + sizes + plain)
    what = "encrypted secret key" if password is not None else "unencrypted secret key"
    beside = path.with_name(f"{path.name}.pub")
    for file in (path, beside):
        if file.exists() or file.is_symlink():
            raise InputError(f"{file} exists. Pass another place: a key is never written over.")
    _write(path, f"{_UNTRUSTED}sae-pipe {what}\n{secret}\n", 0o600)
    line = _base64(_ALGORITHM + key_id + public.raw)
    _write(beside, f"{_UNTRUSTED}minisign public key {public.name}\n{line}\n", 0o644)
    return public


def _write(path: Path, text: str, mode: int) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        fsync_folder(path.parent)
    except OSError as error:
        raise disk_error(error, path) from error


def _stream(path: Path, password: str, salt: bytes, ops: int, mem: int) -> bytes:
    """104 bytes of scrypt, with the parameters that libsodium picks for so much work and memory."""
    if not 0 < mem <= _MOST_MEM_BYTES or not 0 < ops <= 1 << 26:
        raise InputError(
            f"{path} asks for more work or memory than minisign does. It was not read."
        )
    ops, r, p = max(ops, 32768), 8, 1
    if ops < mem // 32:
        n = _largest_power(ops // (r * 4))
    else:
        n = _largest_power(mem // (r * 128))
        p = max(ops // 4 // n // r, 1)
    return hashlib.scrypt(
        # As the environment gives it, whatever bytes these are.
        password.encode("utf-8", "surrogateescape"),
        salt=salt,
        n=n,
        r=r,
        p=p,
        maxmem=2 * _MOST_MEM_BYTES - 1,
        dklen=104,
    )


def _largest_power(limit: int) -> int:
    """The first power of two above half the limit."""
    return 1 << max((limit // 2).bit_length(), 1)


def _xor(a: bytes, b: bytes) -> bytes:
    return bytes(x ^ y for x, y in zip(a, b, strict=True))


def _lines(path: Path, what: str) -> list[str]:
    try:
        if not path.is_file() or path.stat().st_size > LIMIT_BYTES:
            raise InputError(f"There is no {what} at {path}. Pass the file of one.")
        return path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"The {what} {path} cannot be read ({error}).") from error


def _bytes(line: str, length: int) -> bytes:
    """Base64 of a known length; ValueError for anything else."""
    found = base64.b64decode(line.strip().encode(), validate=True)
    if len(found) != length:
        raise ValueError(f"{len(found)} bytes")
    return found


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
