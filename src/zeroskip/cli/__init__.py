"""The command line.  Only command bodies import torch, NumPy or Plotly, so that help comes at once."""
