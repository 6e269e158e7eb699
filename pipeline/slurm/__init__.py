"""SLURM: jobs from recipes, what happens inside a job, and what became of it."""
