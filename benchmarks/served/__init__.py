"""A whole server over HTTP, beside its engine in process: `python -m divisi.benchmarks served` and `steps`."""
