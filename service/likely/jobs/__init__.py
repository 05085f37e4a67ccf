"""Batch jobs: draw, score or classify many pictures into a folder of shards; resumable."""
