"""stablelm: distributed pretraining of very deep language models."""

__version__ = "0.1.0"
