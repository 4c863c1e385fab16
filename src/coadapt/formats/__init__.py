"""Files: the only place that knows how tensors are called in them."""
