"""One technique, one file; importing this package makes all of them known to recipes."""

from tfopt.techniques import distill, factorize, prune, quantize

__all__ = ["distill", "factorize", "prune", "quantize"]
