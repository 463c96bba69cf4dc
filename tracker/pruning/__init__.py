"""From importance to a lighter model: which parts to take out, and the checkpoint without them."""
