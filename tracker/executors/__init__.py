"""Where cells are measured: in this process, on a Ray cluster, in SLURM jobs."""
