"""Models that are on this disk already: in the Hub cache, in an Ollama store, in a directory."""
