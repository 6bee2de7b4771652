"""Commands that verify a farm part by part."""
