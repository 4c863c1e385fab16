"""A page in the browser: train, watch, chat, compare. What it knows stands in plain files; `tab_*` and `page` show it."""
