"""What tests share: the launcher, tiny models, programs for ranks."""
