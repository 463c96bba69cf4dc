"""A source of benchmarks' data: folders that a variable of the environment names."""

import os
from pathlib import Path


def find_folder(argument):
    """Return the folder for `data: lab:ARGUMENT`, with DATASET/CONFIGURATION/SPLIT.parquet."""
    return Path(os.environ["LAB_DATA"]) / argument
