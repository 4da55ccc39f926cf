"""Arrays and what computes on them: weight formats and backends. No MPI, no files."""
