"""Addresses: what is one, what is not, and that no credential gets into a message."""

import importlib.util
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae_pipe.storage import InputError, open_store
from sae_pipe.storage.address import SCHEMES, Address, place, shown
from sae_pipe.storage.shard_cache import parse_bytes


def test_an_address_is_told_from_a_path() -> None:
    assert place("acts.zarr") == Path("acts.zarr")
    assert place("file:///data/a%20b.zarr") == Path("/data/a b.zarr")
    found = place("s3://lab/stores/acts.zarr/")
    assert found == Address("s3://lab/stores/acts.zarr")
    assert isinstance(found, Address)
    assert (found.name, found.protocol) == ("acts.zarr", "s3")
    assert str(found.with_name("b.zarr")) == "s3://lab/stores/b.zarr"
    assert place("hf://datasets/someone/acts@main/acts.zarr") == Address(
        "hf://datasets/someone/acts@main/acts.zarr"
    )


@pytest.mark.parametrize(
    "secret",
    [
        "s3://KEY:hunter2@lab/acts.zarr",
        "https://user:hunter2@host/acts.zarr",
        "https://host/acts.zarr?X-Amz-Signature=hunter2",
        "az://box/acts.zarr?sv=1&sig=hunter2",
        "https://host/acts.zarr#hunter2",
    ],
)
def test_an_address_with_credentials_is_refused_without_repeating_them(secret: str) -> None:
    with pytest.raises(InputError, match=r"^An address holds no password, signature or") as found:
        open_store(secret)
    assert "hunter2" not in str(found.value)
    assert "credentials are taken from" in str(found.value)


def test_a_scheme_that_is_not_known_names_those_that_are() -> None:
    names = ", ".join(f"{name}://" for name in SCHEMES)
    message = (
        f"ftp://x/y cannot be opened: ftp:// is not known. Pass a local path, or an address that "
        f"begins with {names} or file://."
    )
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        place("ftp://x/y")


@pytest.mark.parametrize(
    "text", ["s3://lab", "s3://", "s3://lab/../x", "s3://lab//x", "s3://lab/a\nb", "https://h"]
)
def test_what_is_not_the_address_of_a_store_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"^[^\n]* is not the address of a store\. "):
        place(text)


@given(st.text(max_size=40))
def test_any_text_is_a_path_an_address_or_refused(text: str) -> None:
    try:
        found = place(text)
    except InputError:
        return
    assert isinstance(found, Path) or "?" not in found.url


@given(
    user=st.text("abcXYZ09", min_size=1, max_size=8),
    secret=st.text("abcdefXYZ0123456789+=%", min_size=12, max_size=30),
)
def test_no_credential_in_a_url_is_shown(user: str, secret: str) -> None:
    text = f"GET https://{user}:{secret}@host/x?sig={secret}&y=1 failed"
    assert secret not in shown(text)
    assert "https://host/x failed" in shown(text)


@pytest.mark.skipif(importlib.util.find_spec("adlfs") is not None, reason="adlfs is installed")
def test_a_missing_package_is_named_with_the_extra_that_installs_it() -> None:
    message = (
        r"^az:// addresses need adlfs, which is not installed\. "
        r"Run: pip install 'sae-pipe\[azure\]'\.$"
    )
    with pytest.raises(InputError, match=message):
        open_store("az://box/acts.zarr")


def test_sizes_are_read_as_they_are_written() -> None:
    assert parse_bytes("50GB") == 50_000_000_000
    assert parse_bytes(" 1.5 tb ") == 1_500_000_000_000
    assert (parse_bytes("123"), parse_bytes("7M")) == (123, 7_000_000)
    for text in ("", "much", "-3GB", "1e9", "5 GiB"):
        with pytest.raises(InputError, match=f"^{text!r} is not a size"):
            parse_bytes(text)
