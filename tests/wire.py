"""A TCP connection that is counted: wire.py PORT TO_PORT COUNTS BYTES_PER_S DIES_AFTER.

Writes [bytes from clients, bytes from the server] to COUNTS on SIGUSR1. With BYTES_PER_S it is
as slow as that towards the clients; with DIES_AFTER it ends itself after so many bytes of both.
"""

import asyncio
import json
import os
import signal
import sys
from pathlib import Path


class _Wire:
    def __init__(self, to_port: int, counts: Path, bytes_per_s: int, dies_after: int) -> None:
        self._to, self._counts = to_port, counts
        self._rate, self._dies_after = bytes_per_s, dies_after
        self.carried = [0, 0]
        self._free_at = 0.0

    def write(self) -> None:
        temporary = self._counts.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.carried))
        os.replace(temporary, self._counts)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self._to)
        except OSError:
            writer.close()
            return
        await asyncio.gather(self._carry(reader, back, 0), self._carry(there, writer, 1))

    async def _carry(
        self, source: asyncio.StreamReader, target: asyncio.StreamWriter, way: int
    ) -> None:
        try:
            while data := await source.read(1 << 18):
                if self._rate and way == 1:
                    await self._slow_down(len(data))
                self.carried[way] += len(data)
                if self._dies_after and sum(self.carried) > self._dies_after:
                    os._exit(0)
                target.write(data)
                await target.drain()
        except OSError:
            pass
        finally:
            target.close()

    async def _slow_down(self, n_bytes: int) -> None:
        now = asyncio.get_running_loop().time()
        self._free_at = max(self._free_at, now) + n_bytes / self._rate
        await asyncio.sleep(self._free_at - now)


async def main() -> None:
    port, to_port, counts, bytes_per_s, dies_after = sys.argv[1:]
    wire = _Wire(int(to_port), Path(counts), int(bytes_per_s), int(dies_after))
    wire.write()
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, wire.write)
    server = await asyncio.start_server(wire.serve, "127.0.0.1", int(port))
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
