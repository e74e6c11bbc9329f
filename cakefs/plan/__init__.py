"""Decisions, pure: what is shown, where its bytes are, what to fetch next, what to drop."""
