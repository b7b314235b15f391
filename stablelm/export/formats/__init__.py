"""The standard architectures that a folded model is written as, one file each."""
