"""HAProxy in front of the ingress replicas, where the Ray is one that we start.

Ray Serve runs it and tells it where the replicas are; what it may open, keep and say is settled here:

    environment   what Ray's processes are told, and what it takes to run HAProxy at all
    ports         a range of ports for each server on a machine
    config        the edits to the configuration that Ray writes
    start         the program that Ray starts in place of HAProxy: edits, takes over from an orphan, becomes HAProxy
"""
