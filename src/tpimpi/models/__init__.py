"""What a model is, as data, and its mathematics, as pure functions."""
