"""Memory of a rank, predicted before it is used: what it stores, its peak, and the recompute mode that fits."""
