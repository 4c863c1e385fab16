"""An OpenAI-shaped server: one base, many adapters, rows of all of them in one batch."""
