"""What a run shows: metrics on disk, progress in the terminal, plots."""
