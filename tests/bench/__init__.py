"""Side-by-side measurements: `scripts/bench`. Ratios of interleaved runs; never part of the tests."""
