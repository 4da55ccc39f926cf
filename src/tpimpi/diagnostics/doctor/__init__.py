"""Whether these machines can work together, and what to mend."""
