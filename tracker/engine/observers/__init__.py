"""What else is seen of a layer in forward passes: divergences, perturbations, turns."""
