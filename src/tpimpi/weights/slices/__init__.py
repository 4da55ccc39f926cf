"""Slice files: which rank owns what, where it stands in the file, reading and writing."""
