"""The processes of a server: a single one, or several workers under one supervisor."""
