"""`cakefs` with less patience: files that nobody has open are closed after 2 s, so that a soak need not wait for it."""

import sys

from cakefs.cli.main import main
from cakefs.engine.serve import library

library.IDLE_S = 2.0

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
