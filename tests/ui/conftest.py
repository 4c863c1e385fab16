from tiny_run import base, rows  # noqa: F401
