"""A pruned model as a checkpoint: written, proved, described, handed to others."""
