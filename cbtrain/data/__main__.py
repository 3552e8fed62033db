"""`python -m cbtrain.data`: what is understood of the data (`cbtrain.inspect_data`)."""

import sys

from cbtrain.config.cli import run
from cbtrain.inspect_data import main

sys.exit(run(main))
