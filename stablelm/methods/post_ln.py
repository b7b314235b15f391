"""Post-LN: the norm after the sum, as in the first transformer."""

from stablelm.methods.axes import Method, Placement

POST_LN = Method(
    "post_ln",
    "Vaswani et al., Attention Is All You Need, NeurIPS 2017",
    {"placement": "post"},
    # The norm after the last write is the final one.
    (Placement("post", after_write=True),),
)
