"""Measure cells (a model on a benchmark) in one process, several processes, Ray or SLURM.

Modules:
    base: Define the interface of an executor, and open the chosen executor.
    local: Measure cells in this process.
    pool: Call each worker in a thread, and divide devices among workers.
    processes: Measure cells in several processes of this machine.
    ray: Measure cells on a Ray cluster.
    slurm: Measure cells in SLURM jobs.
"""
