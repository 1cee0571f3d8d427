"""`python -m commandbus` is the command line."""

import sys

from commandbus.cli import main

sys.exit(main())
