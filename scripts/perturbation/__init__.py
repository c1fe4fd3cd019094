"""Paper 5, lower bounds on minimal perturbations (Peck et al.)."""
