"""A tiny base, and a few rows to train on."""

from tiny_run import base as base
from tiny_run import rows as rows
