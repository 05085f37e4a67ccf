"""Compares a server with the limits of the hardware and of gRPC: `make bench-serving`.

Raw runs of the graphs, a bare echo server and the server each have their own process, and another
process generates the load. All measurements take turns within one run. Prints a table and writes
`build/bench-serving.json`.
"""
