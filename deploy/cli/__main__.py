"""`python -m divisi.deploy.cli` is `divisi`."""

import sys

from divisi.deploy.cli.main import main

sys.exit(main())
