"""A package, so that its one server is stopped when its last test is done (pytest scopes "package" by this file)."""
