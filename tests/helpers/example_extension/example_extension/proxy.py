"""A proxy: how large a layer's update is."""

from tracker.schema.proxies import Proxy


def update_norm(before, after):
    """Return the length of each token's update [..., tokens]."""
    return (after.float() - before.float()).norm(dim=-1)


UPDATE_NORM = Proxy(
    name="update_norm",
    label="update norm",
    unit="length",
    formula="mean over tokens of ‖x_out − x_in‖",
    observe=update_norm,
)
