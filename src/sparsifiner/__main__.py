"""`python -m sparsifiner`."""

import sys

from sparsifiner.cli import main

sys.exit(main())
