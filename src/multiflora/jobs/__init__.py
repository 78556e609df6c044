"""Whole jobs: a recipe in, a run's folder out."""
