"""Floor 7: sbatch scripts, the supervisor inside the job, the state of runs."""
