"""Fetches a model's files into a folder that several pods share, once, whole and checked.

    source      what there is to fetch, of a hub or of a plain HTTP server
    download    one file: resumed where it was left, checked as it comes
    folder      the lock, the mark of a whole model, and what is in the way
"""
