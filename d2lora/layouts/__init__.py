"""How texts go through a model, and the proof that it gives what plain passes give."""
