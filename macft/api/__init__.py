"""Hold the functions that `import macft` offers and that the commands call."""
