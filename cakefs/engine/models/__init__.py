"""How models come to be: sources and listings, what `add` reads of them, slices, merges and other made ones."""
