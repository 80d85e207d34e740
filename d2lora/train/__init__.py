"""Training an adapter: one train() for both phases and all methods."""
