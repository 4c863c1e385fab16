"""A page in the browser: train, watch, chat, compare. `tab_*` and `page` show what the other files know."""
