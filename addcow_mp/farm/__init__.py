"""Many images: found, drawn as a graph, checked, and committed or flattened in the right order."""
