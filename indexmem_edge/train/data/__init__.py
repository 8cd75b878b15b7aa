"""What is trained on: books, and texts made up on the spot."""
