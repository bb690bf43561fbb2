"""`python -m trainer` is `longaxon train`."""

import sys

from cluster.cli import run

sys.exit(run(["train", *sys.argv[1:]]))
