"""Models: one file each, plus the backbones they share."""
