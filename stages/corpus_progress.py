"""Progress of tokenising: a bar on a terminal, a line every half minute elsewhere."""

import sys
import time

from tqdm import tqdm

_LINE_SECONDS = 30.0


class Progress:
    """Shows rows of how many, documents and tokens with their rate, and the time that is left."""

    def __init__(self, total_rows: int | None, *, enabled: bool) -> None:
        self._total = total_rows
        self._last = (time.monotonic(), 0, 0)  # of the last line: time, rows, tokens
        self._bar: tqdm | None = None
        self._has_lines = enabled and not sys.stderr.isatty()
        if enabled and not self._has_lines:
            self._bar = tqdm(
                total=total_rows, desc="Tokenising", unit=" rows", unit_scale=True, smoothing=0.05
            )

    def update(self, *, rows: int, documents: int, tokens: int) -> None:
        """Counts so far."""
        if self._bar is not None:
            self._bar.set_postfix_str(f"{documents:,} documents, {tokens:,} tokens", refresh=False)
            self._bar.update(min(rows, self._total or rows) - self._bar.n)
        elif self._has_lines and time.monotonic() - self._last[0] >= _LINE_SECONDS:
            print(self._line(rows, documents, tokens), file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _line(self, rows: int, documents: int, tokens: int) -> str:
        """With the rates since the line before, so that what was cached does not count."""
        now, (then, old_rows, old_tokens) = time.monotonic(), self._last
        self._last = (now, rows, tokens)
        of, left = "", ""
        if self._total is not None:
            of = f" of {self._total:,}"
            minutes = max(0, self._total - rows) / max(1, rows - old_rows) * (now - then) / 60
            left = f", about {minutes:.0f} min left"
        return (
            f"Tokenising: {rows:,}{of} rows from {documents:,} documents, {tokens:,} tokens, "
            f"{(tokens - old_tokens) / (now - then):,.0f} tokens/s{left}"
        )
