"""Commands that hand a bundle to those who ask it over a network."""
