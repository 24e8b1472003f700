"""Kernels and model on a GPU: correct first, then how fast. ``python -m divisi.benchmarks.gpu``."""
