"""The trainers' options: one dataclass per algorithm."""
