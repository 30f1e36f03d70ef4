"""Models: one file each, plus the backbones they share."""

from __future__ import annotations
