"""The vendor's sparse library.  See README.md."""
