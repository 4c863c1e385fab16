"""From what the user has to what a model trains on: read, recognised, tokenised, described, shown."""
