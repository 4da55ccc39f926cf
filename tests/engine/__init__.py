"""The model across ranks: window, memory, trace."""
