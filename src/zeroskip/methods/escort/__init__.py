"""Direct sparse convolution.  See README.md."""
