"""Who runs a Program, on memory: arenas, executors, where a net lives, epochs, files."""
