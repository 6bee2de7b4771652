"""The job files: what is moved, what is published, what is refused beforehand."""
