"""Paper 2, incremental dissipativity (Aquino et al.): the certificates."""
