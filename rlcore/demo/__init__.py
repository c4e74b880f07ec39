"""The embedded arithmetic task, the demo, and the survey of all trainers on it."""
