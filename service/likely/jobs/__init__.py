"""Batch jobs: many pictures drawn, scored or classified into shards that a restart resumes."""
