"""What `cakefs doctor` looks at, by subject. Each check stands alone: none fails for another one's reason."""
