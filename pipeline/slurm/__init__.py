"""SLURM: jobs from recipes, what happens inside a job, what became of it, and whether a cluster is fit."""
