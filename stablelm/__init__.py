"""stablelm: distributed pretraining of very deep language models."""

__version__ = "0.2.0"
