"""How near a server is to what the hardware and gRPC can do: `make bench-serving`.

Raw runs of the graphs, a bare echo and the server are measured in processes of their own, the
load comes from another one, and all of them take turns within one run. Prints a table and writes
`build/bench-serving.json`.
"""
