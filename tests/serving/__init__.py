"""What rank 0 alone does: tokenizer, sampling, sessions, perplexity."""
