"""By what the ranks of a test's gang know each other."""

from __future__ import annotations

from divisi.cluster.door import Credentials, Secret

CREDENTIALS = Credentials(Secret(b"the ranks of tests know this key"))
