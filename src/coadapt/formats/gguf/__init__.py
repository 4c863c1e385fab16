"""GGUF, the files of llama.cpp and what is built on it; written with the `gguf` package (extra `gguf`)."""
