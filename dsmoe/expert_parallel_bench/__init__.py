"""One MoE layer on a mesh with each exchange: timed on attached devices, or compiled without any."""
