"""Times that may be written down: checked first, interleaved, with the machine's load in view."""
