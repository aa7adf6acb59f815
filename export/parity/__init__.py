"""The proof that a graph is PyTorch's: compare, runners, backends, tolerances, rendering. May import graph, data and what is below."""
