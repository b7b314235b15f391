"""Seeds that depend on what they are for, and on nothing else."""

import hashlib


def seed_from(*parts: str | int) -> int:
    """A 63-bit seed of the parts (BLAKE2b of their text): the same on every machine, rank and version."""
    text = ":".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
