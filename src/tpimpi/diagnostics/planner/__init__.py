"""How fast a model would be on these ranks, and which shares are best."""
