"""The vendor library.  See README.md."""
