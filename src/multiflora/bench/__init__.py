"""The benchmark: competitors interleaved in one process, ratios with their spread, and the floor of the machine."""
