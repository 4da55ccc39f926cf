"""Configurations, layers and the cache of keys and values."""
