"""Records -> tables, pictures and one HTML page."""
