"""Models of other programs, made into runs."""
