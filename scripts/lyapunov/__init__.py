"""Papers 1 and 2 on MNIST; CIFAR and ImageNet of paper 1 (Rahnama et al.)."""
