"""Answers of what speaks like S3 that are read whole: bounded, whatever the server sends.

botocore reads the body of an error, and of every answer that is no file, into memory and parses it
as XML, which takes ten times that. Bodies of files are read in pieces by `bounded.py`.
"""

from typing import Any

from aiobotocore.httpsession import AIOHTTPSession

from .errors import NetworkError

ERROR_BYTES = 1 << 16  # a code and a sentence
ANSWER_BYTES = 1 << 24  # 1000 names of 1024 bytes, each of which may be written as `&quot;`
_PIECE_BYTES = 1 << 16


class BoundedSession(AIOHTTPSession):  # type: ignore[misc]
    """The session of aiobotocore, which reads no more than that. For `http_session_cls`."""

    async def send(self, request: Any) -> Any:
        is_streamed, request.stream_output = request.stream_output, True  # nothing is read there
        try:
            answer = await super().send(request)
        finally:
            request.stream_output = is_streamed
        is_error = answer.status_code >= 300
        if is_error or not is_streamed:
            limit = ERROR_BYTES if is_error else ANSWER_BYTES
            answer._content = await _bounded(answer.raw, limit)
        return answer


async def _bounded(raw: Any, limit: int) -> bytes:
    pieces, left = [], limit
    async for piece in raw.content.iter_chunked(_PIECE_BYTES):
        pieces.append(piece)
        left -= len(piece)
        if left < 0:
            raw.close()
            raise NetworkError(
                f"{raw.url.origin()} answered with more than {limit:,} bytes where a short answer "
                "was asked for, and what it is was not read. Look at the address and the service."
            )
    return b"".join(pieces)
