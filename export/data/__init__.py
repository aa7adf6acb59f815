"""Text to tokens, for training and calibration. May import checkpoints and model."""
