"""Models, servers and training runs that several test files share."""
