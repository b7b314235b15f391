"""Configuration: the schema, its files and overrides, and the rules across keys."""
