"""Generation: the latent cache, prefill, decoding, sampling, and batches of requests."""
