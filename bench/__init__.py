"""What measures tpimpi, and what it measures with; run as `python -m bench.…` from the top of the checkout."""
