"""Distribute cells over this process, several processes, Ray or SLURM.

Modules:
    base: Define the interface of an executor, and open the one that is asked for.
    child: Start and call a worker process.
    handout: Hand blocks of cells to workers and collect their outcomes.
    local: Measure cells in this process.
    pool: Run the loop that keeps all workers busy.
    processes: Measure cells in several processes of this machine.
    ray: Measure cells on a Ray cluster. The only module that imports Ray.
    slurm: Measure cells in SLURM jobs. The only module that imports submitit.
    worker: Hold the model and the cell of a worker.
"""
