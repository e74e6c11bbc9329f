"""`scripts/stress`: real mounts under kills, evictions and a broken network, and the reference model at length."""
