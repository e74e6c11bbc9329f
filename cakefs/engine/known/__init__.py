"""What is known without fetching: of the store, of tensors' hashes, and of how models differ."""
