"""What a model keeps for its backward pass: measured, and by choice recomputed."""
