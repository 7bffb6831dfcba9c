"""Other libraries' models, made fast in place; each library is imported only when it is asked for."""
