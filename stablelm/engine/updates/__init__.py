"""AdamW in less memory: moments of fewer bytes, and updates in the backward pass."""
