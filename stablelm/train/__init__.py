"""The training loop: start with loop.py."""
