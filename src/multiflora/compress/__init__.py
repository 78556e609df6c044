"""A smaller model instead of an adapter: low-rank plus structured-sparse compression (LoSparse)."""
