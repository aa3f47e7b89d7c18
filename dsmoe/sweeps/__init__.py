"""Sweeps of hyperparameters: which trials there are, who runs them, and what became of them."""
