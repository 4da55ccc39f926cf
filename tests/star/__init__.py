"""The star of ranks: messages, sums, heartbeats."""
