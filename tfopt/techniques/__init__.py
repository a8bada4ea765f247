"""One technique, one file; importing this package makes all of them known to recipes."""

from tfopt.techniques import cluster, distill, factorize, narrow, prune, quantize

__all__ = ["cluster", "distill", "factorize", "narrow", "prune", "quantize"]
