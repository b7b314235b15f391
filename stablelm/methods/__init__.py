"""The space of stability methods: one file a method, the axes and the catalogue, and what methods share.

The latter: roles of matrices, their sizes, solved initialisations (`solve`, `stds`), `spectral` norms.
"""
