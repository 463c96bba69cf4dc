"""All that may be typed or happen to a disk, drawn at random: `make fuzz`, and a part in CI."""
