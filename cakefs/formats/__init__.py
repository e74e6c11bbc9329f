"""File formats, pure: bytes of a prefix -> table of contents; table of contents -> header bytes."""
