"""What can be exported, whatever it is: facts, a module to trace, tensors, an oracle. May import checkpoints and model."""
