"""What the scripts in slurm/ ask of Python: checks of nodes, one rank of a job, sweeps."""
