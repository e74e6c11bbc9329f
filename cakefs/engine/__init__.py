"""Where disk and network meet: indexing, fetching, reading, and the long jobs."""
