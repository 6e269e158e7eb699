"""Tandem on SLURM: what is submitted, how it is followed, and whether a cluster is fit for it."""
