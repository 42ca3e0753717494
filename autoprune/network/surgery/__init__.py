"""Surgery: smaller networks, masked twins and masks, and what has to follow in a module."""
