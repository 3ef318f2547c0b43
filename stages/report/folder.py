"""The folder of a report: written whole file by file, and never over what is not a report of ours.

report.json          says that the folder is ours, and which files we wrote
index.html           the page
latents/NAME.html    a page of latents for each SAE
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...storage import provenance
from ...storage.errors import InputError
from ...storage.files import disk_error, remove_leftovers, write_json, write_whole
from ...storage.plain_json import parse_plain_json

FORMAT, FORMAT_VERSION = "sae-pipe report", 1
MARKER, INDEX, LATENTS = "report.json", "index.html", "latents"
_LIMIT_BYTES = 1 << 24
_PAGE = re.compile(rf"{INDEX}|{LATENTS}/[A-Za-z0-9_.-]+\.html")


def check_place(out: Path) -> None:
    """InputError when something else than a report stands there; touches nothing."""
    if not out.exists():
        return
    try:
        is_ours = out.is_dir() and (_marker(out) is not None or not any(out.iterdir()))
    except OSError as error:
        raise disk_error(error, out) from error
    if not is_ours:
        raise InputError(
            f"{out} exists and is not a report of sae-pipe. Pass another --out, or move it away."
        )


def write_pages(out: Path, pages: Mapping[str, str]) -> None:
    """Write pages by their path in the folder, the index last; remove ours that are no more.

    Raises InputError as `check_place`, DiskError when something cannot be written.
    """
    check_place(out)
    old = _pages_of(out)
    # The marker comes first, so that a report that a kill cut short is known as ours.
    _write_marker(out, sorted({*old, *pages}))
    remove_leftovers(out, deep=True)
    for name in sorted(pages, key=lambda name: name == INDEX):
        assert _PAGE.fullmatch(name), name
        write_whole(out / name, pages[name].encode())
    for name in old:
        if name not in pages:
            (out / name).unlink(missing_ok=True)
    _write_marker(out, sorted(pages))


def page_name(run: str, digest: str, taken: Mapping[str, Any]) -> str:
    """A file name for an SAE's page: of letters that no system minds, and not taken yet."""
    plain = re.sub(r"[^A-Za-z0-9_.-]+", "-", run).strip("-.")[:80] or "run"
    stem = f"{LATENTS}/{plain}-{re.sub('[^0-9a-f]', '', digest)[:8]}"
    name, number = f"{stem}.html", 2
    while name in taken:
        name, number = f"{stem}-{number}.html", number + 1
    return name


def _write_marker(out: Path, pages: list[str]) -> None:
    write_json(
        out / MARKER,
        {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "pages": pages,
            "provenance": {
                "written": provenance.now(),
                "command": provenance.command_line(),
                "versions": provenance.versions(),
            },
        },
    )


def _marker(out: Path) -> dict[str, Any] | None:
    file = out / MARKER
    try:
        if not file.is_file() or file.stat().st_size > _LIMIT_BYTES:
            return None
        found = parse_plain_json(file.read_bytes())
    except ValueError:
        return None
    return found if isinstance(found, dict) and found.get("format") == FORMAT else None


def _pages_of(out: Path) -> list[str]:
    """The pages that an older report wrote; names that we would not write are left alone."""
    pages = (_marker(out) or {}).get("pages")
    if not isinstance(pages, list):
        return []
    return [page for page in pages if isinstance(page, str) and _PAGE.fullmatch(page)]
