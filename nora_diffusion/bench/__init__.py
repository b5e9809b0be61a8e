"""Comparisons of adaptation methods on mini, each one command: ``nora bench``."""
