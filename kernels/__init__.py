"""Compute kernels of Divisi: one folder per operation, plus the choice of implementation by device."""
