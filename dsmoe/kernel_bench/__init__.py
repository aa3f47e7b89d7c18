"""The kernels and their baselines at the models' shapes, timed or compiled."""
