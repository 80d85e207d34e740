"""Train adapters: one train() for both phases and all methods."""
