"""Parts of remote files, of which no more is read than was asked for, whatever the server sends.

fsspec's `cat_file` takes the whole answer into memory. A web server may ignore the range, send a body
without end, or say that it is packed; what speaks like S3 may do so too. The services of Google,
Microsoft and the Hub are asked through `cat_file`: there the server is theirs.
"""

from collections.abc import Callable
from typing import Any

_PIECE_BYTES = 1 << 18

Take = Callable[[bytes], object]


def read_part(
    system: Any, protocol: str, path: str, start: int, stop: int, take: Take
) -> bool | None:
    """Give `take` bytes start to stop of a file in pieces, fewer where it ends before.

    system: an fsspec file system; path: what it calls the file. Returns whether the server knows
    ranges, None where that cannot be told. Raises what the system raises.
    """
    from fsspec.asyn import sync

    if protocol in ("http", "https"):
        has_ranges: bool = sync(system.loop, _of_http, system, path, start, stop, take)
        return has_ranges
    if protocol == "s3":
        sync(system.loop, _of_s3, system, path, start, stop, take)
        return None
    take(system.cat_file(path, start=start, end=stop)[: stop - start])
    return None


async def _of_http(system: Any, url: str, start: int, stop: int, take: Take) -> bool:
    session = await system.set_session()
    headers = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    async with session.get(system.encode_url(url), headers=headers, **system.kwargs) as answer:
        if answer.status == 416:  # the file ends before
            return True
        system._raise_not_found_for_status(answer, url)
        has_ranges = bool(answer.status == 206)
        skip, left = (0 if has_ranges else start), stop - start
        async for piece in answer.content.iter_chunked(_PIECE_BYTES):
            piece, skip = piece[skip:], max(skip - len(piece), 0)
            take(piece[:left])
            left -= len(piece)
            if left < 0:
                answer.close()  # there is more, which nobody wants
                break
    return has_ranges


async def _of_s3(system: Any, path: str, start: int, stop: int, take: Take) -> None:
    bucket, key, _ = system.split_path(path)
    answer = await system._call_s3(
        "get_object", Bucket=bucket, Key=key, Range=f"bytes={start}-{stop - 1}", **system.req_kw
    )
    body, left = answer["Body"], stop - start
    try:
        # To its end, so that the connection can be used again, unless there is more than was asked.
        while left >= 0 and (piece := await body.read(_PIECE_BYTES)):
            take(piece[:left])
            left -= len(piece)
    finally:
        body.close()
