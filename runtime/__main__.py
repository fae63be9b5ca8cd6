"""`python -m offramp.runtime` is `offramp`."""

import sys

from .cli import main

sys.exit(main())
