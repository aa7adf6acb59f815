"""What `scripts/fuzz` feeds headfold with. Every draw is of one random.Random, so kind and seed make the same input anywhere."""
