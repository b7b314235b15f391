"""The page of a run: one HTML file, made of what the run directory holds."""
