"""Jobs on SLURM: what is asked for, the job script, what comes back. Imports no torch."""
