"""Errors by their names there. coadapt raises ValueError, and warns with UserWarning."""

PeftError = NoMatchingPeftModuleError = ValueError
PeftWarning = UserWarning
