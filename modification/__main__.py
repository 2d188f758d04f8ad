"""``python -m modification``."""

import sys

from modification.cli import main

sys.exit(main())
