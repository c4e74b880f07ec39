"""What the trainers share by importing functions."""
