"""The least code that trains a decoder of GPT-2's shape well: torch's own modules, fused attention, nothing of ours."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PlainLayer(nn.Module):
    """Pre-LN: causal attention, then a GELU feed-forward of four times the width."""

    def __init__(self, d_model: int, n_heads: int):
        super().__init__()
        self.n_heads = n_heads
        self.norm_attention, self.norm_feedforward = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.qkv, self.output = nn.Linear(d_model, 3 * d_model), nn.Linear(d_model, d_model)
        self.fc1, self.fc2 = nn.Linear(d_model, 4 * d_model), nn.Linear(4 * d_model, d_model)

    def forward(self, x: Tensor) -> Tensor:  # x: (batch, seq, d_model)
        heads = self.qkv(self.norm_attention(x)).unflatten(-1, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.output(mixed.transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm_feedforward(x))))


class PlainDecoder(nn.Module):
    """Tokens (batch, seq) -> logits (batch, seq, vocab_size); learned positions, an untied head."""

    def __init__(self, n_layers: int, d_model: int, n_heads: int, seq_len: int, vocab_size: int):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab_size, d_model), nn.Embedding(seq_len, d_model)
        self.layers = nn.ModuleList(PlainLayer(d_model, n_heads) for _ in range(n_layers))
        self.norm, self.head = nn.LayerNorm(d_model), nn.Linear(d_model, vocab_size, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                deep = name.endswith(("output.weight", "fc2.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * n_layers) ** 0.5 if deep else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))
