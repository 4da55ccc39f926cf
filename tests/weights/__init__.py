"""Model files, slices, and who gets which."""
