"""Scores of a composition on prepared rows, each with the interval that it is known to."""
