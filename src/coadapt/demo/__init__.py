"""The demo: a tiny language model that the project pretrains itself, and a task that it cannot do yet."""
