"""Batching: one queue per graph; requests are admitted, merged into batches, and run in lanes."""
