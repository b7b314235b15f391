"""Signal and gradient of every layer at initialisation, beside the theory."""
