"""The door without FUSE: files and tensors of models in a Python program, and for whatever speaks fsspec."""
