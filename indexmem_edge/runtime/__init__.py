"""What runs beside a cache: its history, prompts, cancels and copies."""
