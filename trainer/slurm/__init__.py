"""Jobs on SLURM: resource requests, the job script, submission, and how a job ended. Imports no torch."""
