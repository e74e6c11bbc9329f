"""`python -m cakefs` is `cakefs`."""

import sys

from cakefs.cli.main import main

sys.exit(main())
