"""Text to tokens on disk, to rows, to batches."""
