"""``python -m msflow_ext`` is ``msflow``."""

from __future__ import annotations

import sys

from msflow_ext.cli import main

sys.exit(main())
