"""The HTTP server of rank 0's machine: a front process with the sockets, beside rank 0, which computes."""
