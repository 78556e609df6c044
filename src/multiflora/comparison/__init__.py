"""Comparisons: several methods at one budget, several seeds, and what the numbers allow one to say."""
