"""Where the server runs: in one process, or in several workers under one supervisor."""
