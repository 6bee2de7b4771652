"""The commands that lend overlays to QEMU."""
