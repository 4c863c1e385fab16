"""What coadapt costs, beside the limit and the field's library; docs/benchmarks.md says how each figure is taken."""
