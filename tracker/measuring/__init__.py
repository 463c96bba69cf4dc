"""From what was asked for to outcomes: look up, plan, measure block by block, derive records."""
