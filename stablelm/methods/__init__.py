"""The space of stability methods: axes, catalogue, one file a method."""
