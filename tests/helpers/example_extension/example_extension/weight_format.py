"""A format of weights: the sign of each weight, and a scale a block of 32."""

from tracker.schema.weight_formats import WeightFormat


def round_to_sign(weights):
    """Round float32 weights [rows, inputs] and return them as numbers."""
    blocks = weights.reshape(-1, 32)
    scale = blocks.abs().mean(dim=1, keepdim=True)
    return (blocks.sign() * scale).reshape(weights.shape)


SIGN1 = WeightFormat(
    name="sign1",
    label="signs, blocks of 32",
    block=32,
    bits=1.5,  # a bit, and a scale of 16 bits a block
    source="example-extension",
    round=round_to_sign,
)
