"""`model.gguf` of a model in safetensors, made of the very same blobs. Pure."""
