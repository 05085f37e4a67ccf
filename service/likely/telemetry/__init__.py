"""The metrics that a server exports to Prometheus."""
