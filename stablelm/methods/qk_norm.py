"""QK-norm: queries and keys of unit RMS, which bounds the logits; the attention key `qk_norm` of any method."""

from stablelm.methods.axes import Method

QK_NORM = Method(
    "qk_norm",
    "Wortsman et al., Small-scale proxies for large-scale Transformer training instabilities, ICLR 2024",
    {"attention.qk_norm": True},
)
