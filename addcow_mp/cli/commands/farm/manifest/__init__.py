"""Commands that write the manifests of a farm."""
