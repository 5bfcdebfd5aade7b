"""The network in parts: its layers, the cache of decoding, the compiled programs; llama_model puts them together."""
