"""Our own modelling file for transformers, and what is written for it."""
