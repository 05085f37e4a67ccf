"""A tour of likely: `python -m demo` serves three bundles and asks them three questions."""
