"""How gradients become updates: one file an optimizer, listed in catalogue.py; the engine spreads their tensors."""
