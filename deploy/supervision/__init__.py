"""The processes around the driver of `divisi serve`: signals reach it in order, and nothing outlives it.

    front     the process that was started: receives the signals, passes them on as orders, returns the exit status
    keeper    leader of a session of its own: sees to deadlines, and ends whatever is left
    driver    does the work; Ray's own processes are its children

The keeper is the subreaper of all that the driver starts, so that its descendants are this instance's processes,
all of them and no others, wherever they were started and whatever sessions they have gone to.
"""

from divisi.deploy.supervision.front import supervised
from divisi.deploy.supervision.keeper import say
from divisi.deploy.supervision.orders import Orders

__all__ = ["Orders", "say", "supervised"]
