"""Commands that write manifests."""
