"""Places inside a deflate stream where inflating can begin: the starts of its blocks, found by trying.

zlib does not tell where blocks begin. A block of Huffman codes has a header whose numbers must fit
together, so numpy finds the few bits that may begin one, and inflating from there shows which do: from a
true start the same bytes come out that the whole stream gave.
"""

import zlib
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import numpy as np

try:  # inflates more than twice as fast; there is none for some processors
    from isal import isal_zlib

    inflating: Any = isal_zlib
except ImportError:
    inflating = zlib

crc32 = inflating.crc32
# What inflating bytes that are no deflate stream raises.
ERRORS: tuple[type[Exception], ...] = (zlib.error, inflating.error)

# Farthest that a deflate stream refers back.
WINDOW = 32 << 10
# Bytes looked through at once.
STEP = 4 << 10
# So many equal bytes cannot come from a false start.
PROOF = 4096
# Part of the space, in 1/128, that a code of this length takes; 0 is none.
SHARE = np.array([0, 64, 32, 16, 8, 4, 2, 1], np.uint16)


class Block(NamedTuple):
    """Start of a block: `bit` of the compressed bytes, `before` inflated bytes come ahead of it."""

    bit: int
    before: int
    window: bytes


def find_block(data: bytes, tail: bytes, out: bytes) -> Block | None:
    """The first block that begins inside `data`, compressed bytes that inflated to all of `out`.

    `tail`: up to WINDOW inflated bytes of the same stream before `out`. None when no block was found.
    """
    for bit in candidates(data):
        guess = _tried(data, bit, bytes(WINDOW))
        if guess is None or not PROOF <= len(guess) <= len(out):
            continue
        before = len(out) - len(guess)
        window = (tail + out[:before])[-WINDOW:]
        if window and _tried(data, bit, window) == out[before:]:
            return Block(bit, before, window)
    return None


def candidates(data: bytes) -> Iterator[int]:
    """Bits of `data`, ascending, at which the header of a dynamic block that is not the last may begin."""
    padded = np.frombuffer(data + bytes(16), np.uint8)
    for start in range(0, len(data), STEP):
        part = padded[start : start + STEP + 16]
        # words[i]: the 64 bits from byte i on
        words = np.ascontiguousarray(np.lib.stride_tricks.sliding_window_view(part, 8)).view("<u8")[:, 0]
        size = min(STEP, len(data) - start)
        heads = words[:size].astype(np.uint32)[:, None] >> np.arange(8, dtype=np.uint32)  # one for each bit
        bits = np.flatnonzero(heads & 7 == 4)
        heads = heads.ravel()[bits]
        fits = (heads & (31 << 3) <= 29 << 3) & (heads & (31 << 8) <= 29 << 8)
        bits, counts = bits[fits], ((heads[fits] >> 13) & 15) + 4
        yield from (start * 8 + bits[_complete(words, bits + 17, counts)]).tolist()


def _complete(words: np.ndarray, place: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Whether the codes of the code lengths, `counts` numbers of 3 bits from `place` on, use up their space exactly."""
    lengths = words[place >> 3] >> (place & 7).astype(np.uint64)
    used = np.zeros(len(place), np.uint16)
    for index in range(19):
        length = (lengths >> np.uint64(3 * index)) & 7
        used += SHARE[length] * (index < counts)
    return used == 128


def _tried(data: bytes, bit: int, window: bytes) -> bytes | None:
    inflater = inflater_at(bit % 8, window)
    try:
        out = inflater.decompress(padding(bit % 8, data[bit // 8]))
        out += inflater.decompress(memoryview(data)[bit // 8 + 1 :])
    except ERRORS:
        return None
    return None if inflater.eof else out


def inflater_at(bit: int, window: bytes):
    """An inflater for the middle of a stream; its first bytes must be `padding(bit, first byte)`."""
    raw = -zlib.MAX_WBITS
    return inflating.decompressobj(raw, zdict=window) if window else inflating.decompressobj(raw)


def padding(bit: int, first: int) -> bytes:
    """Blocks without content that end `bit` bits into a byte, whose other bits are those of `first`."""
    value, length = _empty_blocks(bit)
    whole = length // 8
    last = value >> (8 * whole) | first >> bit << bit
    return (value & ((1 << 8 * whole) - 1)).to_bytes(whole, "little") + bytes([last])


@cache
def _empty_blocks(bit: int) -> tuple[int, int]:
    """Bits, as a number whose lowest bit comes first, and how many; congruent `bit` modulo 8."""
    value = length = 0
    if bit % 2:
        value, length = _odd_block()
    while length % 8 != bit:
        # Fixed codes and at once the end of the block: 10 bits.
        value |= 0b10 << length
        length += 10
    return value, length


def _odd_block() -> tuple[int, int]:
    """An empty block of 95 bits: one with codes of its own, of which only the end of the block is used."""
    code_lengths = {18: 1, 0: 2, 1: 2}
    order = (16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15)
    fields = [(0, 1), (2, 2), (0, 5), (0, 5), (15, 4), *((code_lengths.get(symbol, 0), 3) for symbol in order)]
    # 138 and 118 symbols without a code, then length 1 for the end of the block and 0 for the distance.
    fields += [(0, 1), (138 - 11, 7), (0, 1), (118 - 11, 7), (0b11, 2), (0b01, 2), (0, 1)]
    value = length = 0
    for field, width in fields:
        value |= field << length
        length += width
    return value, length
