"""Trading compute for memory: each layer's activations are thrown away and recomputed in the backward pass."""

from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper


def recompute_layers(layers: nn.ModuleList) -> None:
    """Replaces each layer by one that keeps its inputs only; dropout draws the same masks again."""
    for index, layer in enumerate(layers):
        layers[index] = checkpoint_wrapper(layer, preserve_rng_state=True)
