"""Other programs that generate text, run on the same emulated devices as tpimpi."""
