"""The sweep over group counts with its results, plots and page; the GLU study. May import bundle and below."""
