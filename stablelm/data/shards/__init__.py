"""Prepared tokens: the files that hold them, how they are written, filtered and read."""
