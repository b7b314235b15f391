"""What signal-propagation theory predicts of a model at initialisation (pure float64 functions)."""
