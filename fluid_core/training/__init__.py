"""Training: the loader, the DeepSpeed engine, the loop, EMA, checkpoints, and what is measured on the way."""
