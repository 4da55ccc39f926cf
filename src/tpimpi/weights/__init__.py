"""Models on disk: other people's files, our slices, and how the one becomes the other."""
