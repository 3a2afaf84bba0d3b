"""Scores of a trained model: exact checks on shape scenes, retrieval and tone on OpenMoji, and what the VAE allows at best."""
