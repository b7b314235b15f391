"""The decoder-only language model: embedding, layers, final norm, head and loss."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stablelm.config.schema import ModelConfig
from stablelm.methods.placement import make_placement
from stablelm.methods.stream import make_stream
from stablelm.model.linear import Linear, make_dtypes
from stablelm.model.loss import LossSums, chunked_cross_entropy
from stablelm.model.norms import Norm
from stablelm.model.positions import Rotation, rotation_table
from stablelm.model.sublayer import Layer


class Decoder(nn.Module):
    """A stack of layers around the stream; it knows nothing of ranks.

    `config` is resolved (no None); `precision` is fp32, bf16 or fp64. Parameters are left unset, so
    that it can be built on the meta device: `methods.initialise` gives the values.
    """

    def __init__(self, config: ModelConfig, precision: str):
        super().__init__()
        assert config.vocab_size is not None
        assert config.max_seq_len is not None
        self.config = config
        self.dtypes = dtypes = make_dtypes(precision, config.stream_dtype)
        self.stream = make_stream(config)
        self.embedding = _table(config.vocab_size, config.d_model, dtypes.parameter)
        learned = config.attention.position == "learned"
        self.position = _table(config.max_seq_len, config.d_model, dtypes.parameter) if learned else None
        self.layers = nn.ModuleList(Layer(config, dtypes) for _ in range(config.n_layers))
        self.norm_final = Norm(config, dtypes) if make_placement(config).final else None
        untied = not config.tie_embeddings
        self.head = Linear(config.d_model, config.vocab_size, bias=False, dtypes=dtypes) if untied else None

    def head_weight(self) -> Tensor:
        """The output matrix (vocab_size, d_model); the embedding itself when tied."""
        return self.embedding.weight if self.head is None else self.head.weight

    def forward(self, tokens: Tensor, targets: Tensor | None = None, z_loss: float = 0.0) -> "Tensor | LossSums":
        """tokens: (batch, seq) int64 -> hidden (batch, seq, d_model) in the compute dtype, or, with targets, sums.

        targets: (batch, seq) int64, -100 = ignored; `z_loss` weighs log(Z)^2 in `LossSums.total`.
        Call the module, not this method: sharding engines hook the call.
        """
        hidden = self._hidden(tokens)
        if targets is None:
            return hidden
        return chunked_cross_entropy(hidden.flatten(0, 1), self.head_weight(), targets.flatten(), z_loss=z_loss)

    def _hidden(self, tokens: Tensor) -> Tensor:
        rotation = self._rotation(tokens)
        chunks = self.stream.start(self._embed(tokens))
        for layer in self.layers:
            chunks = self.stream.join(chunks, layer(chunks, rotation))
        x = self.stream.finish(chunks)
        if self.norm_final is not None:
            x = self.norm_final(x)
        return x.to(self.dtypes.compute)

    def _embed(self, tokens: Tensor) -> Tensor:
        """(batch, seq) -> (batch, seq, d_model) in the stream's dtype."""
        x = self.embedding(tokens)
        if self.position is not None:
            seq_len = tokens.shape[1]
            assert seq_len <= self.position.num_embeddings, "a sequence is longer than model.max_seq_len"
            x = x + self.position(torch.arange(seq_len, device=tokens.device))
        return F.dropout(x, self.config.dropout, self.training).to(self.dtypes.stream)

    def _rotation(self, tokens: Tensor) -> Rotation:
        """The rotary table shared by all layers; empty without rope."""
        config = self.config
        if config.attention.position != "rope":
            return ()
        d_head = config.d_model // config.n_heads
        base, dtype = config.attention.rope_base, self.dtypes.parameter
        return rotation_table(tokens.shape[1], d_head, base, dtype=dtype, device=tokens.device)


def _table(rows: int, width: int, dtype: torch.dtype) -> nn.Embedding:
    """An embedding whose values are left unset."""
    return nn.Embedding.from_pretrained(torch.empty(rows, width, dtype=dtype), freeze=False)
