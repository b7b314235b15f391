"""From prompts to text: sampling, the key-value cache's rows, and text that grows token by token."""
