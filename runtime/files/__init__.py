"""Files of a bundle that nobody vouches for: JSON, the graph, engines. May import errors, manifest and plugins."""
