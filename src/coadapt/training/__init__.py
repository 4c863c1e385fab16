"""Glue to transformers' own Trainer: settings, one rate and clipping for each adapter, what is recorded."""
