"""Starts the processes of a run: on this machine, by ssh, under SLURM and on TPU pods."""
