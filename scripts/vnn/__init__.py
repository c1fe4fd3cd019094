"""Instances of the VNN-COMP: ACAS Xu and mnist_fc."""
