"""From torch to the master graph: trace, passes, weights, bodies. May import checkpoints and model."""
