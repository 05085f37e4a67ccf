"""The Open Inference Protocol: another skin over the same use cases."""
