"""What the process of a rank is set to: environment variables, torch's global switches, compilation."""
