"""The vendor's 2:4 library.  See README.md."""
