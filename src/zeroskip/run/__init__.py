"""A plan made executable: static buffers, the engine, and its file."""
