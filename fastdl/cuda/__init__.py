"""Programs on a GPU: calls become launches (`plan`), launches one graph, arenas live in device memory (`executor`)."""
