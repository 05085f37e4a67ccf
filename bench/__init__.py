"""How near the graphs are to what the hardware can do: `make bench`.

CPU time of one thread, variants interleaved in one process, minimum and median
over rounds. Prints tables and writes `build/bench.json`.
"""
