"""What every side of a federation agrees on: words, contracts, bytes, the pool, the gate, users' data."""
