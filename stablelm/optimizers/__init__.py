"""How gradients become updates: one file an optimizer, listed in catalogue.py; their tensors are spread by the engine."""
