"""From a lowered module to a library with real machine code in it."""
