"""Evaluation of checkpoints: loss on text, tasks, and generation."""
