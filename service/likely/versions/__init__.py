"""Which versions of which models live: loaded, proved, labelled, replaced, unloaded."""
