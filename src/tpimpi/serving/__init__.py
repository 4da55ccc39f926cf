"""What rank 0 alone does: text, sampling, sessions, answers, the report."""
