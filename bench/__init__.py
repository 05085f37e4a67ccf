"""Compares the graphs with the limits of the hardware: `make bench`.

Measures CPU time on one thread. All variants take turns in one process; the figures are the
minimum and the median over the rounds. Prints tables and writes `build/bench.json`.
"""
