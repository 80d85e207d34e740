"""Define how texts share a forward pass, and prove that a layout gives the same log-probabilities as plain passes of
single texts.
"""
