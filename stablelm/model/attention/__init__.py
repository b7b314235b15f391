"""Attention: its body, what it needs of positions and documents, its kernels, its cache for generation."""
