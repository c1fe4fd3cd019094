"""Paper 3, localized robustness (Bontonou et al.)."""
