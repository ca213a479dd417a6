"""Hold what several test files share."""
