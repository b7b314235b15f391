"""Perplexity of checkpoints and validation sets."""
