"""Chat templates, run apart from this process, with bounds. May import errors."""
