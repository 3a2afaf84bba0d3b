"""Fluid: autoregressive text-to-image generation with continuous tokens in random order (arXiv 2410.13863)."""

__version__ = "0.1.0"
