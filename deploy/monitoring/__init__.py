"""Watching a running server: alerts, dashboards, a Prometheus beside it, and `divisi report`."""
