"""The transfer processes: how they are started and spoken to, what they may do, and what they do."""
