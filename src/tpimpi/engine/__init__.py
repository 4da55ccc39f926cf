"""One rank's part of a run: its engine, window, memory and the protocol between rank 0 and the others."""
