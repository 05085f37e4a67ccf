"""The Open Inference Protocol, on top of our own services."""
