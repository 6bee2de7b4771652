"""The add-cow format: bytes in, bytes out. Knows no devices, jobs or processes."""
