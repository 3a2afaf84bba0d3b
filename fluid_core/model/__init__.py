"""The method: a masked autoregressive transformer with a per-token head (Fluid, arXiv 2410.13863).

Read in this order: tokens, orders, masking, draws, layers, positions, aligner, trunk, head, fluid.
"""
