"""How fast this machine's kernels and disks, and the links between ranks, are."""
