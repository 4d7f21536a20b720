"""A regular package: else `benchmarks/chexquery.py`, beside which it is imported, would be found in its place."""
