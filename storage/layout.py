"""Sizes: how many rows make a chunk, a shard and a block.

A chunk is the unit of decode, a shard the unit of commit, resume and transfer (one file), a block
the unit of shuffle and of work (held in memory while it is filled).
"""

from dataclasses import dataclass

from .errors import InputError

VALUE_BYTES = 2  # bfloat16; sizes of windows and shards are counted in it
CONTAINER_BYTES = 4  # float32
CHUNK_BYTES = 4 << 20  # of the container: decoded in cache, 1024 rows at d_in 768
SHARD_BYTES = 256 << 20  # of raw bfloat16: 131,072 rows at d_in 768
MAX_CHUNK_BYTES = 1 << 28  # a reader allocates one of these a thread before it sees data
MIN_SHARDS = (
    8  # small stores keep several shards, so that the reader can mix and a crash costs little
)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where the rows of one split stand.

    n_rows: rows of the split; d_in: values a row; chunk_rows divides shard_rows divides block_rows.
    """

    n_rows: int
    d_in: int
    chunk_rows: int
    shard_rows: int
    block_rows: int

    def __post_init__(self) -> None:
        sizes = (self.n_rows, self.d_in, self.chunk_rows, self.shard_rows, self.block_rows)
        if any(type(size) is not int or size < 0 for size in sizes) or 0 in sizes[1:]:
            raise InputError(f"A layout needs positive whole sizes, found {sizes}.")
        if self.chunk_rows * self.d_in * CONTAINER_BYTES > MAX_CHUNK_BYTES or self.n_rows > 2**48:
            raise InputError(f"A layout of {sizes} is larger than any that is written.")
        if self.shard_rows % self.chunk_rows or self.block_rows % self.shard_rows:
            raise InputError(
                f"Chunk rows {self.chunk_rows} must divide shard rows {self.shard_rows}, and these "
                f"block rows {self.block_rows}."
            )

    @property
    def n_shards(self) -> int:
        return -(-self.n_rows // self.shard_rows)

    @property
    def n_blocks(self) -> int:
        return -(-self.n_rows // self.block_rows)

    @property
    def chunks_per_shard(self) -> int:
        return self.shard_rows // self.chunk_rows

    def rows_of_shard(self, shard: int) -> tuple[int, int]:
        """First and one-past-last row."""
        first = shard * self.shard_rows
        return first, min(first + self.shard_rows, self.n_rows)

    def rows_of_block(self, block: int) -> tuple[int, int]:
        """First and one-past-last row."""
        first = block * self.block_rows
        return first, min(first + self.block_rows, self.n_rows)

    def shards_of_block(self, block: int) -> range:
        first, last = self.rows_of_block(block)
        return range(first // self.shard_rows, -(-last // self.shard_rows))


def _power_of_two_near(wanted: float) -> int:
    """The one whose ratio to the wanted number is the smallest."""
    below = _power_of_two_up_to(wanted)
    return below if wanted * wanted <= 2 * below * below else 2 * below


def _power_of_two_up_to(limit: float) -> int:
    return 1 << max(int(limit).bit_length() - 1, 0) if limit >= 1 else 1


def default_chunk_rows(d_in: int) -> int:
    """Rows of a chunk where the codec does not ask for a number of its own."""
    return min(max(_power_of_two_up_to(CHUNK_BYTES / (d_in * CONTAINER_BYTES)), 64), 8192)


def choose_layout(
    *,
    n_rows: int,
    d_in: int,
    block_bytes: int,
    shard_rows: int | None = None,
    value_bytes: int = VALUE_BYTES,
    chunk_rows: int | None = None,
) -> Layout:
    """The layout of a split, a pure function of its arguments.

    block_bytes: memory for one block of raw rows, of value_bytes a value. A block is at least one
    shard. chunk_rows: where the codec asks for a number of its own.
    """
    if chunk_rows is None:
        chunk_rows = default_chunk_rows(d_in)
    if shard_rows is None:
        largest = _power_of_two_near(SHARD_BYTES / (d_in * VALUE_BYTES))
        for_small = _power_of_two_up_to(max(n_rows, 1) / MIN_SHARDS)
        shard_rows = max(min(largest, for_small), 256)
    chunk_rows = min(chunk_rows, shard_rows)
    shards_a_block = max(block_bytes // (shard_rows * d_in * value_bytes), 1)
    shards_needed = max(-(-n_rows // shard_rows), 1)
    return Layout(
        n_rows=n_rows,
        d_in=d_in,
        chunk_rows=chunk_rows,
        shard_rows=shard_rows,
        block_rows=min(shards_a_block, shards_needed) * shard_rows,
    )
