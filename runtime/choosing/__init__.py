"""Which token comes next: settings, restrictions, sampling. May import errors and files."""
