"""Distribute cells over this process, several processes, Ray or SLURM.

Modules:
    base: Define the interface of an executor, and open the one that is asked for.
    local: Measure cells in this process.
    pool: Call workers in threads, which share blocks by their locks; divide devices among them.
    processes: Measure cells in several processes of this machine.
    ray: Measure cells on a Ray cluster. The only module that imports Ray.
    slurm: Measure cells in SLURM jobs. The only module that imports submitit.
"""
