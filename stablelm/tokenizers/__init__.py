"""From documents to tokens: tokenizers of every kind behind one interface, loaded and trained."""

from stablelm.tokenizers.interface import Encoder, Tokenizer
from stablelm.tokenizers.location import load_tokenizer

__all__ = ["Encoder", "Tokenizer", "load_tokenizer"]
