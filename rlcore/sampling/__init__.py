"""From prompts to judged completions."""
