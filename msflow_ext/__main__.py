"""Run the command ``msflow`` as ``python -m msflow_ext``."""

from __future__ import annotations

import sys

from msflow_ext.cli import main

sys.exit(main())
