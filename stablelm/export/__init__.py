"""Models of finished runs in other programs' formats."""
