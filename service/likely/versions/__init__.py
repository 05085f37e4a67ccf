"""Versions of models: how they are loaded, tested, labelled, replaced and unloaded."""
