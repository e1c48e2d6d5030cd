"""SLURM: submission scripts, the supervisor inside the job, the state of runs."""
