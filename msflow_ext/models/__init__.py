"""Models, one file each, and the backbones that they share."""

from __future__ import annotations
