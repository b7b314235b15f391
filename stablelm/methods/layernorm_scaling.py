"""LayerNorm scaling: the norm before a body divided by the square root of its depth (Sun et al. 2025)."""

from stablelm.methods.axes import Method, Placement

LAYERNORM_SCALING = Method(
    "layernorm_scaling",
    "Sun et al., The Curse of Depth in Large Language Models, 2025",
    {"placement": "pre_scaled", "norm": "rmsnorm", "init": "fan_in"},
    (Placement("pre_scaled", before_body=True, final=True, by_depth=True),),
)
