"""``python -m msflow_ext`` is ``msflow``."""

import sys

from msflow_ext.cli import main

sys.exit(main())
