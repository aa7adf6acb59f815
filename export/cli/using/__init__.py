"""The commands that run a bundle."""
