"""The way to a model hub: the card of an adapter folder, and the push."""
