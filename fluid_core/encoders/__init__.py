"""The two frozen encoders: images to latents (KL VAE, VQ) and captions to text states (T5), with ids and weight hashes."""
