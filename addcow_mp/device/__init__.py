"""The guest's view of a chain of files: extents, read, write, flush. Knows no processes."""
