"""What a mount keeps while it serves: its models, its counters and where they are read, adding on demand."""
