"""The mark of a position without a target, for those who make targets and those who score them; needs no torch."""

IGNORED = -100  # a target that does not count: also what `ignore_index` is in torch by default
