"""Folders of AdapterHub's `adapters`: bottlenecks, LoRA, (IA)^3, prefixes, ReFT and unions of them, read."""
