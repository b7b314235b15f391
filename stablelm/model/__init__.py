"""The decoder, which asks the axes and knows nothing of ranks."""
