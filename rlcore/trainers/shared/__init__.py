"""What several trainers import: the run, its data, experience, policies, critic, metrics."""
