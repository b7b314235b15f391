"""Peri-LN: norms before and after each body, and on the embeddings (Kim et al., ICML 2025)."""

from stablelm.methods.axes import Method, Placement

PERI_LN = Method(
    "peri_ln",
    "Kim et al., Peri-LN: Revisiting Normalization Layer in the Transformer Architecture, ICML 2025",
    {"placement": "peri", "embedding_norm": True, "init": "fan_in"},
    (Placement("peri", before_body=True, on_branch=True, final=True),),
)
