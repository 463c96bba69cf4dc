"""Distribute cells over this process, several processes, Ray or SLURM.

Modules:
    base: Define the interface of an executor, and open the chosen executor.
    local: Measure cells in this process.
    pool: Call workers in threads that share blocks by locks, and divide devices among workers.
    processes: Measure cells in several processes of this machine.
    ray: Measure cells on a Ray cluster. No other module imports Ray.
    slurm: Measure cells in SLURM jobs. No other module imports submitit.
"""
