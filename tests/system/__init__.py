"""What the machine gives: buffers, memory, placement of ranks, direct reads."""
