"""Knows no method, no quantiser, no file format. All that needs torch comes through here: versions are checked."""

from ..versions import require

require()
