"""Many trainings beside each other: methods compared, and the best combination searched."""
