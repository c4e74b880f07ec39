"""From prompts to judged completions: decoding, rewards, the sandbox for code."""
