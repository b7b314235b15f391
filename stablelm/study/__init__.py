"""Measures over several runs."""
