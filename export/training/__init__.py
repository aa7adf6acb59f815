"""Options, loop, state, losses, evaluation, uptrain. May import graph, data and below."""
