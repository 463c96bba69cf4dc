"""Distribute cells over this process, several processes, Ray or SLURM.

Modules:
    base: Define the interface of an executor, and open the one that is asked for.
    devices: Count the devices that a worker needs, and divide them among workers.
    local: Measure cells in this process.
    pool: Call workers in threads, which share the blocks of cells by their locks.
    processes: Measure cells in several processes of this machine.
    ray: Measure cells on a Ray cluster. The only module that imports Ray.
    slurm: Measure cells in SLURM jobs. The only module that imports submitit.
    worker: Make the worker of another process ready.
"""
