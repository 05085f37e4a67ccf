"""One queue a graph: requests are admitted, merged into batches, and run in lanes."""
