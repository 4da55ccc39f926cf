"""The tests; a package for each room of src/tpimpi, and one for whole runs."""
