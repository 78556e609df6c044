"""Looking inside: what an adapter's update, its heads and its routers are like, measured and drawn."""
