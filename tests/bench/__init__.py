"""The programs of the folder bench."""
