"""The trainers' options, one dataclass per algorithm, and their checks."""
