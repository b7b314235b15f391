"""What a plan says: its figures, as text and as JSON."""
