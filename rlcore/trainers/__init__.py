"""The trainers: each one function that reads top to bottom."""
