"""What a streamed token costs in the HTTP process: `python -m divisi.benchmarks http`."""
