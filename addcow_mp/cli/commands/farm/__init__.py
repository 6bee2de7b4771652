"""Commands that look at many images at once."""
