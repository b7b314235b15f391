"""Updates of what a rank holds: rules of optimizers, moments of fewer bytes, updates in the backward pass, averages."""
