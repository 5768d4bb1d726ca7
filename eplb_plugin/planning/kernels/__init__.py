"""Compiled search over the placements of single layers, for loads on the CPU.

`api` has the functions on tensors that the rest of planning calls. Numba compiles all other modules, and
`api` imports them on first use. Compiled code releases the interpreter lock and is cached on disk. It runs
without `fastmath`, and every sum has a fixed order: the same input gives the same placement on every machine.

A layer with several snapshots is planned for its smooth peak (`snapshot_*`). A single load has no later
snapshot to differ from, so it is planned for its true peak (`single_load_*`).
"""
