"""The decoder-only language model: embedding, layers, final norm, head and loss."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stablelm.config.schema import ModelConfig
from stablelm.methods.concatenation import Concatenation
from stablelm.methods.sizes import stream_width
from stablelm.model import branch_factors
from stablelm.model.added_parameters import add_parameters, named_parameters_of
from stablelm.model.attention import attention_kernels, documents
from stablelm.model.attention.cache import KeyValueCache
from stablelm.model.attention.positions import Positions, positions_of
from stablelm.model.devices import to_device
from stablelm.model.linear import Dtypes, Linear, make_dtypes
from stablelm.model.loss import LossSums, TokenScores, chunked_cross_entropy, drawn_tokens, token_scores
from stablelm.model.norms import Norm
from stablelm.model.sublayer import Chunks, Layer, Sublayer
from stablelm.model.token_loss import TokenLoss

Tap = Callable[[int, Chunks], Chunks]
"""Sees the stream after the embedding (0) and after each layer (1 ...), and returns the stream to continue with."""


class Decoder(nn.Module):
    """A stack of layers around the stream; it knows nothing of ranks.

    `config` is resolved (no None); `precision` is fp32, bf16 or fp64. Parameters are left unset, so
    that it can be built on the meta device: `model.initialise` gives the values.
    """

    def __init__(self, config: ModelConfig, precision: str):
        super().__init__()
        assert config.vocab_size is not None
        assert config.max_seq_len is not None
        self.config = config
        self.dtypes = dtypes = make_dtypes(precision, config.stream_dtype)
        axes = config.axes
        self.stream = axes.stream.at(config)
        self.tap: Tap | None = None
        self.compiled_loss = False
        self.embedding = _table(config.vocab_size, config.d_model, dtypes.parameter)
        rows = config.max_seq_len if axes.position.adds_table else None
        self.position = _table(rows, config.d_model, dtypes.parameter) if rows is not None else None
        gains = axes.norm.embedding_gain(config) is not None
        self.scaling = EmbeddingGain(dtypes) if gains else None
        self.norm_embedding = Norm(config, dtypes, config.d_model) if config.embedding_norm else None
        firsts = [axes.stack.first_place(config, layer) for layer in range(axes.stack.distinct(config))]
        self.layers = nn.ModuleList(Layer(config, dtypes, place) for place in firsts)
        self.places = axes.stack.places(config)
        end = stream_width(config, config.n_layers)
        eps_scale = self.stream.eps_scale(config, 2 * config.n_layers)
        self.norm_final = Norm(config, dtypes, end, eps_scale=eps_scale) if axes.placement.final else None
        grown = self.stream.grows
        self.projection = Linear(end, config.d_model, bias=False, dtypes=dtypes) if grown else None
        self.head = None if config.tie_embeddings else Head(config, dtypes)
        if axes.reparam.tables:
            self.embedding.reparam = axes.reparam  # pyright: ignore[reportArgumentType]

    def head_weight(self) -> Tensor:
        """The output matrix (vocab_size, d_model); the embedding itself when tied."""
        return self.embedding.weight if self.head is None else self.head.matrix()

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        z_loss: float = 0.0,
        cache: KeyValueCache | None = None,
        logits_at: Tensor | None = None,
        places: Tensor | None = None,
        token_loss: TokenLoss | None = None,
        boundaries: Tensor | None = None,
        draws: Tensor | None = None,
        factors: Tensor | None = None,
    ) -> "Tensor | LossSums | TokenScores":
        """tokens: (batch, seq) int64 -> hidden (batch, seq, d_model) in the compute dtype, or, with targets, sums.

        targets: (batch, seq) int64, -100 = ignored; `z_loss` weighs log(Z)^2 in `LossSums.total`, in which `token_loss`
        takes the cross-entropy's place. `cache`: of the tokens before these, to which these are added. `logits_at`:
        (batch,) int64, a column of each row, whose logits (batch, vocab_size) in the parameter dtype are returned in
        place of hidden states. With places (n,), indices into batch * seq, targets (n,) are tokens to score after each
        of them. With draws (batch, seq) tokens (batch, seq) of the model's own distribution (`loss.drawn_tokens`) are
        returned. `boundaries`: of `Decoder.boundaries`; without them a GPU is waited for where its kernel takes them.
        `factors`: of `Decoder.branch_factors`, for a training step; without them branches have their usual ones.
        Call the module, not this method: sharding engines hook the call.
        """
        hidden = self._hidden(tokens, cache, boundaries, factors)
        if logits_at is not None:
            return self.logits(hidden[torch.arange(len(hidden), device=hidden.device), logits_at])
        if draws is not None:
            flat = draws.flatten()
            return self._with_head(hidden.flatten(0, 1), lambda x, w: drawn_tokens(x, w, flat)).view(tokens.shape)
        if targets is None:
            return hidden
        if places is not None:
            return self._with_head(hidden.flatten(0, 1)[places], lambda x, weight: token_scores(x, weight, targets))
        return self.sums(hidden, targets, z_loss, token_loss)

    def sums(self, hidden: Tensor, targets: Tensor, z_loss: float, token_loss: TokenLoss | None) -> LossSums:
        """hidden: (batch, seq, d_model) in the compute dtype; the rest as of `forward`."""
        options = {"z_loss": z_loss, "token_loss": token_loss, "compiled": self.compiled_loss}
        use = partial(chunked_cross_entropy, targets=targets.flatten(), **options)
        return self._with_head(hidden.flatten(0, 1), use)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: (..., d_model) in the compute dtype -> (..., vocab_size) in the parameter dtype."""
        return self._with_head(hidden, lambda x, weight: F.linear(x, weight.to(x.dtype)).to(self.dtypes.parameter))

    def _with_head(self, hidden: Tensor, use: Callable[[Tensor, Tensor], Any]) -> Any:
        """`use` of hidden states and the output matrix, by a call of the head where there is one."""
        return use(hidden, self.embedding.weight) if self.head is None else self.head(hidden, use)

    def _hidden(
        self, tokens: Tensor, cache: KeyValueCache | None, boundaries: Tensor | None, factors: Tensor | None
    ) -> Tensor:
        if factors is None:
            factors = branch_factors.usual(self.config, self.dtypes, training=self.training)
        factors = None if factors is None else to_device(factors, tokens.device)
        positions = self.positions(tokens, boundaries) if cache is None else cache.enter(tokens, self.dtypes)
        chunks = self._tapped(0, self._start(self.embed(tokens, cache), cache))
        values: Chunks = ()
        for index, place in enumerate(self.places):
            of_layer = None if cache is None else cache.layers[index], None if factors is None else factors[index]
            new = self.layers[place](chunks, positions, values, *of_layer)
            if self.config.axes.value_mixing.share is not None and not values:
                *new, first = new
                values, new = (first,), tuple(new)
            chunks = self._tapped(index + 1, self.stream.settle(self.stream.join(chunks, new)))
        if cache is not None:
            cache.leave(tokens.shape[1])
        return self.finish(chunks)

    def _start(self, embedded: Tensor, cache: KeyValueCache | None) -> Chunks:
        """A concatenated stream is trained on in one buffer, unless somebody looks at its parts."""
        appends = self.stream.grows and torch.is_grad_enabled() and self.tap is None and cache is None
        if appends and all(part.takes_concatenation for part in self.modules() if isinstance(part, Sublayer)):
            width = stream_width(self.config, self.config.n_layers)
            return Concatenation.start(embedded, width, self.dtypes.compute)
        return self.stream.start(embedded)

    def _tapped(self, index: int, chunks: Chunks) -> Chunks:
        return chunks if self.tap is None else self.tap(index, chunks)

    def embed(self, tokens: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """(batch, seq) -> (batch, seq, d_model) in the stream's dtype; `cache`: of a call under way."""
        x = self.embedding(tokens)
        share = self.config.embedding_gradient_scale
        if share != 1:
            x = x.detach() + share * (x - x.detach())  # the value to the last bit
        scale = self.config.axes.init.embedding_scale(self.config)
        if scale != 1:
            x = x * scale
        if self.scaling is not None:
            x = self.scaling(x)
        if self.position is not None:
            length = tokens.shape[1] if cache is None else cache.end
            assert length <= self.position.num_embeddings, "a sequence is longer than model.max_seq_len"
            x = x + self.position(self._places(tokens, cache))
        x = F.dropout(x, self.config.dropout, self.training)
        if self.norm_embedding is not None:
            x = self.norm_embedding(x)
        return x.to(self.dtypes.stream)

    def _places(self, tokens: Tensor, cache: KeyValueCache | None) -> Tensor:
        """The rows of the table of positions for these tokens, (seq,) or (batch, seq)."""
        end = self.config.attention.document_end
        if cache is not None:
            return cache.places if end is None else cache.document_places(end)
        return torch.arange(tokens.shape[1], device=tokens.device) if end is None else documents.places(tokens, end)

    def finish(self, chunks: Chunks) -> Tensor:
        """The stream after all layers -> what the head multiplies, (batch, seq, d_model) in the compute dtype."""
        x = self.stream.end(chunks, self.norm_final).to(self.dtypes.compute)
        if self.projection is not None:
            x = self.projection(x)
        scale = self.config.axes.init.head_scale(self.config)
        return x if scale == 1 else x * scale

    def positions(self, tokens: Tensor, boundaries: Tensor | None = None) -> Positions:
        """Of whole rows of tokens, (batch, seq), shared by all layers; `boundaries`: what the method of that name gave
        for them, if it was called."""
        return positions_of(self.config, self.dtypes, tokens, self.kernel(tokens.device), boundaries)

    def boundaries(self, tokens: Tensor, device: torch.device) -> Tensor | None:
        """For `forward` on a GPU whose kernel takes them, of tokens (batch, seq) still on the CPU; nothing waits."""
        end = self.config.attention.document_end
        if end is None or self.kernel(device) != "varlen":
            return None
        return to_device(documents.boundaries(tokens, end), device)

    def branch_factors(self, seed: int, step: int) -> Tensor | None:
        """For `forward` in a training step: what multiplies each branch, 0 for those that are left out; None: nothing
        does. The same for every rank and micro-batch."""
        return branch_factors.drawn(self.config, self.dtypes, seed, step)

    def kernel(self, device: torch.device) -> attention_kernels.Kernel:
        """What averages values by attention on this device."""
        return attention_kernels.choose(self.config, self.dtypes.compute, attention_kernels.gpu_of(device))


class EmbeddingGain(nn.Module):
    """A learned factor of the token embeddings, left unset."""

    def __init__(self, dtypes: Dtypes):
        super().__init__()
        self.embedding_gain = nn.Parameter(torch.empty(1, dtype=dtypes.parameter))

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, seq, d_model), in the parameter dtype."""
        return x * self.embedding_gain


class Head(Linear):
    """The output matrix, for the functions that multiply by it: called with them, so that engines can hook the use."""

    def __init__(self, config: ModelConfig, dtypes: Dtypes):
        assert config.vocab_size is not None
        reparam = config.axes.reparam if config.axes.reparam.tables else None
        super().__init__(config.d_model, config.vocab_size, bias=False, dtypes=dtypes, reparam=reparam)
        self.gains = config.axes.gains.at(config)
        self.added = add_parameters(self, self.gains.in_head(config), dtypes)

    def matrix(self) -> Tensor:
        """What hidden states are multiplied by, (vocab_size, d_model)."""
        return self.gains.output_matrix(self.weight, named_parameters_of(self, self.added))

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, hidden: Tensor, use: Callable[[Tensor, Tensor], Any]
    ) -> Any:
        """What `use` makes of hidden states and the matrix (vocab_size, d_model)."""
        return use(hidden, self.matrix())


def _table(rows: int, width: int, dtype: torch.dtype) -> nn.Embedding:
    """An embedding whose values are left unset."""
    return nn.Embedding.from_pretrained(torch.empty(rows, width, dtype=dtype), freeze=False)
