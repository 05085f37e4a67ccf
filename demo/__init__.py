"""A tour of likely: `python -m demo` serves the shipped bundle and asks it three questions."""
