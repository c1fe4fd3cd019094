"""Paper 4, convex potential layers (Meunier et al.)."""
