"""What a run costs before it is started: parameters, FLOPs, chips."""
