"""Commands, one in each module."""
