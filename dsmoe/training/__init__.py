"""One optimizer step: losses, balancing, optimizer, and the jitted function that joins them."""
