"""Saving and loading: the format of tensors, commit, fencing, retention."""
