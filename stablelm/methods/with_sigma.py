"""Combinations of a method with sigmaReparam."""

from stablelm.methods import catformer, deepscalelm, magneto, sigma_reparam
from stablelm.methods.axes import Method

DEEPSCALELM_SIGMA = Method(
    "deepscalelm_sigma",
    f"{deepscalelm.KEDIA}; {sigma_reparam.ZHAI}",
    {**deepscalelm.DEFAULTS, **sigma_reparam.DEFAULTS},
)
MAGNETO_SIGMA = Method(
    "magneto_sigma", f"{magneto.WANG}; {sigma_reparam.ZHAI}", {**magneto.DEFAULTS, **sigma_reparam.DEFAULTS}
)
CATFORMER_SIGMA = Method(
    "catformer_sigma", f"{catformer.DAVIS}; {sigma_reparam.ZHAI}", {**catformer.DEFAULTS, **sigma_reparam.DEFAULTS}
)
