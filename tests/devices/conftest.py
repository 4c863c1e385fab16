"""A tiny base and a few rows to train on, and the run that one process makes of them."""

from tiny_run import base as base
from tiny_run import rows as rows
