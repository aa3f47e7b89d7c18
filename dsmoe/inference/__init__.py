"""Generation: the latent cache, prefill and decoding, sampling, and the batcher that joins requests."""
